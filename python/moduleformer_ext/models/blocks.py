"""What a configuration is made of: its blocks, their first weights and the routing loss of a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from moduleformer_ext import ops
from moduleformer_ext.models.activations import ACTIVATIONS
from moduleformer_ext.models.config import MoLMConfig
from moduleformer_ext.models.experts import ExpertsConfig
from moduleformer_ext.nn import (
    Block,
    BlockRoutes,
    ExpertLinear,
    MixtureOfAttention,
    MixtureOfFFN,
    Router,
    make_router,
)
from moduleformer_ext.nn.router import GateType, RouterOrder
from moduleformer_ext.types import RouteTopK, RoutingSums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BlockKind = TypeVar("BlockKind", bound=Block)

_AUX_LOSSES: dict[str, Callable[[RouteTopK | RoutingSums], Tensor] | None] = {
    "mi": lambda route: ops.losses.mutual_information_loss(route),
    "concentration": lambda route: ops.losses.concentration_loss(route),
    "switch": lambda route: ops.losses.switch_loss(route),
    "none": None,
}
"""The routing loss of one layer, for each of config.AUX_LOSS_TYPES."""


def routing_loss(kind: str, routes: Sequence[BlockRoutes], group: ProcessGroup | None = None) -> Tensor:
    """The routing loss of one pass: of this process's tokens, or of those of all processes of a group."""
    loss = _AUX_LOSSES[kind]
    if loss is None:
        return torch.zeros_like(routes[0].ffn.plogp_sum)
    own = [route for block in routes for route in block]
    summed = own if group is None else ops.losses.sum_over_processes(own, group)
    return torch.stack([loss(route) for route in summed]).sum()


def make_block(config: MoLMConfig, layer: int, kind: type[BlockKind] = Block) -> BlockKind:  # type: ignore[assignment]
    """The block of a layer, of this class."""

    def router(experts: ExpertsConfig) -> Router:
        return make_router(
            cast(GateType, config.gate_type),
            config.n_embd,
            experts.in_layer("num_experts", layer),
            experts.k,
            gating_size=config.gating_size,
            dropout=config.moe_pdrop,
            order=cast(RouterOrder, config.router_order),
            sample_topk=config.sample_topk,
            num_normaliser_rows=experts.in_layer("normaliser_rows", layer),
        )

    attention = MixtureOfAttention(
        config.n_embd,
        config.attention.hidden,
        config.n_head,
        router(config.attention),
        stick_epsilon=config.stick_epsilon,
        expert_bits=config.expert_bits,
    )
    ffn = MixtureOfFFN(
        config.n_embd,
        config.ffn.hidden,
        router(config.ffn),
        activation=ACTIVATIONS[config.activation_function],
        expert_bits=config.expert_bits,
    )
    return kind(
        config.n_embd,
        attention,
        ffn,
        layer_norm_epsilon=config.layer_norm_epsilon,
        dropout=config.resid_pdrop,
    )


def draw(module: nn.Module, std: float) -> None:
    """Initialise what PyTorch would initialise differently; all other layers of ours start as they should."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def redraw(module: nn.Module, std: float) -> None:
    """Draw the weights of one module anew, those of its children aside."""
    if isinstance(module, (nn.LayerNorm, ExpertLinear, Router)):
        module.reset_parameters()
    else:
        draw(module, std)
