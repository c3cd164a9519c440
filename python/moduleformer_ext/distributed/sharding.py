"""A model whose parameters are spread over processes by PyTorch's FSDP2, whole only where they are computed with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moduleformer_ext.distributed.expert_parallel import spread_experts
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
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
    """Whether it is of one layer, used once in the forward pass; what is outside of the layers stays gathered."""
    spread: bool
    """Whether each process has experts of its own, and gathers them from those that have the same ones."""


def units(model: MoLMForCausalLM, *, expert_parallel: bool = False) -> list[Unit]:
    """A model's units: the feed-forward experts of a layer with their router, the rest of the layer, and what is
    outside of the layers. With expert parallelism the experts of either kind by themselves, without their router.
    """
    modules: list[tuple[nn.Module, bool, bool]] = []
    for block in blocks(model):
        if expert_parallel:
            attention = block.attn.q_proj
            modules += [(attention.experts, True, True), (attention.output_experts, True, True)]
            modules += [(block.mlpf.gate, True, False), (block.mlpf, True, True)]
        else:
            modules.append((block.mlpf, True, False))
        modules.append((block, True, False))
    found, known = [], set[nn.Parameter]()
    for module, in_layer, spread in [*modules, (model, False, False)]:
        parameters = [parameter for parameter in module.parameters() if parameter not in known]
        known |= set(parameters)
        found.append(Unit(module, parameters, in_layer, spread))
    return found


def shard_model(
    model: MoLMForCausalLM,
    mesh: DeviceMesh,
    *,
    expert_mesh: DeviceMesh | None = None,
    gather_dtype: torch.dtype | None = None,
    reshard: bool = True,
) -> None:
    """Shard a model, which may be on the meta device, over a mesh of one dimension, in its :func:`units`.

    Args:
        expert_mesh: of two dimensions and the same processes, for expert parallelism: those along the second one hold
            different experts, to which tokens travel
            (:func:`~moduleformer_ext.distributed.expert_parallel.spread_experts`), those along the first one the same,
            sharded as all else is over the whole mesh.
        gather_dtype: of the parameters while they are computed with; None: their own. bfloat16 halves what is sent, and
            rounds norms and routers, which autocast alone leaves in float32. Gradients are added up in float32.
        reshard: free a layer's parameters between the forward and the backward pass, and gather them once more.

    Raises:
        ValueError: the first dimension of ``expert_mesh`` does not divide ``n_embd``.
    """
    # What the experts give is written to in no place.
    views = r"FSDP2-wrapped module \(\w*(MixtureOfFFN|ExpertLinear)\) returned a view"
    warnings.filterwarnings("ignore", views, UserWarning)
    policy = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    sharing, ignored = mesh, set[nn.Parameter]()
    if expert_mesh is not None:
        check_expert_mesh(model.config, expert_mesh.size(0))
        sharing, across = (expert_mesh[name] for name in expert_mesh.mesh_dim_names or ())
        spread_experts(blocks(model), across)
        ignored = _without_experts(model, expert_mesh)
    for unit in units(model, expert_parallel=expert_mesh is not None):
        fully_shard(
            unit.module,
            mesh=sharing if unit.spread else mesh,
            mp_policy=policy,
            reshard_after_forward=reshard and unit.in_layer,
            shard_placement_fn=partial(_placement, unit.spread, sharing.size() if unit.spread else mesh.size()),
            ignored_params=ignored,
        )
    if expert_mesh is not None:
        _gather_in_one_order(model)


def _gather_in_one_order(model: MoLMForCausalLM) -> None:
    """Say what is gathered ahead in the backward pass. FSDP's own choice is the next unit of a process, and differs
    where one has no experts: it would wait for others that wait for it. A module tells it to go on for each of its
    results, the routes of a block among them, so that those with one result alone gather others ahead.
    """
    before: Block | None = None
    ahead: dict[nn.Module, list[nn.Module]] = {model: [model]}
    for block in blocks(model):
        attention, ffn = block.attn.q_proj, block.mlpf
        ahead |= {module: [module] for module in (block, ffn, attention.output_experts)}
        ahead[ffn.gate] = [attention.output_experts, attention.experts, *([before] if before else [])]
        ahead[attention.experts] = [before.mlpf, before.mlpf.gate] if before else [attention.experts]
        before = block
    for module, others in ahead.items():
        cast(FSDPModule, module).set_modules_to_backward_prefetch(cast("list[FSDPModule]", others))


def _without_experts(model: MoLMForCausalLM, expert_mesh: DeviceMesh) -> set[nn.Parameter]:
    """The matrices of which this process has no experts, which FSDP cannot hold: it leaves them alone, and they get
    here the form that it gives the others.
    """
    found = set[nn.Parameter]()
    for unit in units(model, expert_parallel=True):
        for name, parameter in list(unit.module.named_parameters()) if unit.spread else ():
            if local(parameter).numel():
                continue
            shared = _placement(True, expert_mesh.size(0), parameter)
            size = list(parameter.shape)
            size[shared.dim] //= expert_mesh.size(0)
            part = torch.empty(0, *size[1:], dtype=parameter.dtype, device=parameter.device)
            spread = DTensor.from_local(
                part, expert_mesh, [shared, Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
            owner, _, key = name.rpartition(".")
            replaced = nn.Parameter(spread, requires_grad=parameter.requires_grad)
            unit.module.get_submodule(owner).register_parameter(key, replaced)
            found.add(replaced)
    return found


def check_expert_mesh(config: MoLMConfig, sharing: int) -> None:
    """Refuse a number of processes that share each expert among them and cannot cut it evenly."""
    if config.n_embd % sharing:
        raise ValueError(
            f"expert_parallel: n_embd must be a multiple of the {sharing} processes that share each expert, got "
            f"{config.n_embd}"
        )


def blocks(model: MoLMForCausalLM) -> Iterator[Block]:
    """Its layers."""
    return (cast(Block, block) for block in model.transformer.h)


def _placement(spread: bool, processes: int, parameter: nn.Parameter) -> Shard:
    """The first dimension that divides, so that nothing is padded; else the first one, which FSDP pads. Experts that
    are spread are cut along that already.
    """
    sizes = [(dim, size) for dim, size in enumerate(parameter.shape) if not (spread and dim == 0)]
    return Shard(next((dim for dim, size in sizes if size % processes == 0), 0))


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
