"""How attention_layer_decode and ffn_layer_decode call their operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moduleformer_ext.ops._segments import segments
from moduleformer_ext.quantised import QuantisedMatrices
from moduleformer_ext.types import NormedRouter, RouteTopK, Segments


def expert_weight(op: str, argument: str, value: Segments | QuantisedMatrices) -> tuple[list[Tensor], list[int]]:
    """As the operators take matrices of experts: segments beside nothing, or numbers and scales beside their format."""
    if isinstance(value, QuantisedMatrices):
        return [value.values, value.scales], [value.bits, value.in_features, value.out_features]
    return segments(op, argument, value), []


def layer_decode(
    op: str, x: Tensor, router: NormedRouter, *own: Any, return_route: bool
) -> Tensor | tuple[Tensor, RouteTopK]:
    """``own`` is what the op takes behind what both take."""
    if not isinstance(router, NormedRouter):
        raise ValueError(f"{op}: router must be a NormedRouter, got {type(router).__name__}")
    router = router._replace(gate_weight=segments(op, "gate_weight", router.gate_weight))
    operator = getattr(torch.ops.moduleformer_ext, op)
    results = (operator.with_route if return_route else operator.default)(x, *router, *own)
    return (results[0], RouteTopK(*results[1:])) if return_route else results
