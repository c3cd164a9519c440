"""Every expert and every attention head spread over the processes of a mesh, by PyTorch's ``parallelize_module``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.models.activations import ACTIVATIONS
from moduleformer_ext.nn import LayerCache, StaticLayerCache
from moduleformer_ext.nn.segments import whole_name
from moduleformer_ext.ops.grouped_gemm import GATED_ACTIVATIONS

_FEATURES = {"experts.weight": Shard(2), "output_experts.weight": Shard(1)}
_EXPERTS = {"experts.weight": Shard(0), "output_experts.weight": Shard(0)}
_HEADS = {f"q_proj.{name}": placement for name, placement in _FEATURES.items()} | {
    f"{name}_proj.{kind}": Shard(0) for name in "kv" for kind in ("weight", "bias")
}


def molm_tp_plan(model: MoLMForCausalLM) -> dict[str, ParallelStyle]:
    """A plan for :func:`torch.distributed.tensor.parallel.parallelize_module` on a mesh of one dimension.

    Feed-forward experts are cut along their hidden width (whole experts are dealt out where the activation is gated),
    attention by heads: the columns of the query experts and of keys and values, the rows of the output experts. One
    all-reduce follows either, forward and backward. All else, routers too, is on every process, as DTensors. Between
    modules tensors are plain and the same on every process: the model takes and returns what it always does.

    Raises:
        ValueError: in ``parallelize_module``, where the number of processes does not divide ``n_head`` or, without a
            gated activation, ``ffd_hidden``.

    Example:
        >>> mesh = init_device_mesh("cuda", (8,))  # doctest: +SKIP
        >>> parallelize_module(model, mesh, molm_tp_plan(model))  # doctest: +SKIP
    """
    config = model.config
    everywhere = _Style({}, {})
    gated = ACTIVATIONS[config.activation_function] in GATED_ACTIVATIONS
    return {
        "transformer.wte": everywhere,
        "transformer.h.*.ln_*": everywhere,
        "transformer.h.*.attn": _Style(_HEADS, {"n_head": config.n_head}) if config.n_head > 1 else everywhere,
        "transformer.h.*.mlpf": _Style(_EXPERTS, {}) if gated else _Style(_FEATURES, {"ffd_hidden": config.ffn.hidden}),
        "transformer.ln_f": everywhere,
        "lm_head": everywhere,
    }


class _Style(ParallelStyle):
    """A module whose parameters are DTensors with these placements, Replicate where none is given, and that computes
    with DTensors between plain inputs and outputs.
    """

    def __init__(self, placements: Mapping[str, Placement], divided: Mapping[str, int]) -> None:
        super().__init__()
        self._placements = placements
        self._divided = divided
        self._made = WeakTensorKeyDictionary()  # a shared parameter stays one

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, size in self._divided.items():
            if size % device_mesh.size():
                raise ValueError(
                    f"molm_tp_plan: {name} must be a multiple of the mesh's {device_mesh.size()} processes, got {size}"
                )
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            owner, _, key = name.rpartition(".")
            if parameter not in self._made:
                placement = self._placements.get(whole_name(name), Replicate())
                sharded = distribute_tensor(parameter, device_mesh, [placement], src_data_rank=self.src_data_rank)
                self._made[parameter] = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
            module.get_submodule(owner).register_parameter(key, self._made[parameter])
        module.register_forward_pre_hook(partial(_enter, mesh=device_mesh), with_kwargs=True)
        module.register_forward_hook(_leave)
        return module


def _enter(_module: nn.Module, args: Any, kwargs: Any, *, mesh: DeviceMesh) -> tuple[Any, Any]:
    def wrap(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, DTensor) else DTensor.from_local(tensor, mesh, [Replicate()])

    return pytree.tree_map_only(Tensor, wrap, (args, kwargs), is_leaf=_is_cache)


def _leave(_module: nn.Module, _args: Any, output: Any) -> Any:
    return pytree.tree_map_only(DTensor, lambda tensor: tensor.full_tensor(), output, is_leaf=_is_cache)


def _is_cache(value: Any) -> bool:
    """What a layer remembers stays where its heads are."""
    return isinstance(value, (LayerCache, StaticLayerCache))
