"""A model whose parameters are spread over processes by PyTorch's FSDP2, whole only where they are computed with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.models.blocks import draw, make_block
from moduleformer_ext.nn import Block, Linear
from moduleformer_ext.nn.segments import whole_name

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
"""What options call the types that parameters are gathered in, and autocast to; None leaves them as they are."""


class Unit(NamedTuple):
    """What is gathered at once."""

    module: nn.Module
    parameters: list[nn.Parameter]
    in_layer: bool
    """Whether it can be freed between the forward and the backward pass."""


def units(model: MoLMForCausalLM) -> list[Unit]:
    """A model's units: the feed-forward experts of a layer with their router, the rest of the layer, and what is
    outside of the layers.
    """
    modules = [(module, True) for block in blocks(model) for module in (block.mlpf, block)] + [(model, False)]
    found, known = [], set[nn.Parameter]()
    for module, in_layer in modules:
        parameters = [parameter for parameter in module.parameters() if parameter not in known]
        known |= set(parameters)
        found.append(Unit(module, parameters, in_layer))
    return found


def shard_model(
    model: MoLMForCausalLM,
    mesh: DeviceMesh,
    *,
    gather_dtype: torch.dtype | None = None,
    reshard: bool = True,
) -> None:
    """Shard a model, which may be on the meta device, over a mesh of one dimension, in its :func:`units`.

    Args:
        gather_dtype: of the parameters while they are computed with; None: their own. bfloat16 halves what is sent, and
            rounds norms and routers, which autocast alone leaves in float32. Gradients are added up in float32.
        reshard: free a layer's parameters between the forward and the backward pass, and gather them once more.
    """
    # The blocks add what the experts give, in no place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w*MixtureOfFFN\) returned a view", UserWarning)
    policy = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units(model):
        fully_shard(
            unit.module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard and unit.in_layer,
            shard_placement_fn=lambda parameter: _placement(parameter, mesh.size()),
        )


def blocks(model: MoLMForCausalLM) -> Iterator[Block]:
    """Its layers."""
    return (cast(Block, block) for block in model.transformer.h)


def _placement(parameter: nn.Parameter, processes: int) -> Shard:
    """The first dimension that divides, so that nothing is padded; else the first one, which FSDP pads."""
    return Shard(next((dim for dim, size in enumerate(parameter.shape) if size % processes == 0), 0))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy this process's part of a tensor that every process has."""
    if isinstance(target, DTensor):
        whole = local(
            distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        )
    local(target).copy_(whole)


def load_weights(model: MoLMForCausalLM, read: Callable[[str], Tensor]) -> None:
    """Fill a sharded model, one tensor after the other, from ``read(name)``, the whole tensor of that name in a state
    dict.
    """
    _fill_below(model, model, "", read)


def _fill_below(model: nn.Module, module: nn.Module, path: str, read: Callable[[str], Tensor]) -> None:
    for name, parameter in module.named_parameters():
        whole_name, start = whole_of(model, f"{path}{name}")
        whole = read(whole_name.removeprefix(path))
        fill(parameter, whole if start is None else whole[start : start + parameter.shape[0]])


def whole_of(model: nn.Module, name: str) -> tuple[str, int | None]:
    """The state dict's name of a parameter and, of a segment (:mod:`moduleformer_ext.nn.segments`), the row of the
    whole where it begins.
    """
    path, _, leaf = name.rpartition(".")
    stem, module = whole_name(leaf), model.get_submodule(path)
    if stem == leaf or f"{stem}_old" not in module._parameters:
        return name, None
    start = 0 if leaf == f"{stem}_old" else module.get_parameter(f"{stem}_old").shape[0]
    return f"{path}.{stem}", start


def draw_weights(model: MoLMForCausalLM) -> None:
    """Draw the first weights of a sharded model: bit for bit those that ``MoLMForCausalLM(config)`` draws from the same
    random state, for any number of processes. No more than one layer is whole at a time.
    """
    config, std = model.config, model.config.initializer_range
    nn.Embedding(config.vocab_size, config.n_embd)  # what it draws is drawn again, but moves the random state
    for layer, block in enumerate(blocks(model)):
        drawn: dict[str, Tensor] = make_block(config, layer).state_dict()
        _fill_below(model, block, f"transformer.h.{layer}.", drawn.__getitem__)
    for name, parameter in model.transformer.ln_f.named_parameters():
        fill(parameter, (torch.ones if name == "weight" else torch.zeros)(parameter.shape))
    _draw_below(model, model.transformer, "transformer", std)
    drawn_head = Linear(config.n_embd, config.vocab_size, bias=False)
    draw(drawn_head, std)
    if not config.tie_word_embeddings:
        fill(model.lm_head.weight, drawn_head.weight)


def _draw_below(model: nn.Module, module: nn.Module, path: str, std: float) -> None:
    """:func:`draw` a whole stand-in for every module, in the order of :meth:`torch.nn.Module.apply`."""
    for name, child in module.named_children():
        _draw_below(model, child, f"{path}.{name}", std)
    if isinstance(module, (nn.Linear, nn.Embedding)):
        with torch.device("meta"):
            if isinstance(module, nn.Embedding):
                whole: nn.Module = nn.Embedding(module.num_embeddings, module.embedding_dim)
            else:
                whole = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        draw(whole.to_empty(device="cpu"), std)
        _fill_below(model, module, f"{path}.", whole.state_dict().__getitem__)
