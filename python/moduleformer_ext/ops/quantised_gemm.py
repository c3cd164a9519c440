"""Multiply every routed slot by the quantised matrix of its expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moduleformer_ext.quantised import QuantisedMatrices
from moduleformer_ext.types import ExpertLayout


def quantised_gemm(
    x: Tensor,
    weight: QuantisedMatrices,
    layout: ExpertLayout,
    *,
    x_order: str = "token",
    out_order: str = "expert",
    gates: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """:func:`~moduleformer_ext.ops.grouped_gemm` with matrices of 8 or 4 bits, which are read as they are: the fewer
    bytes, the faster a token. For inference: there is no gradient.

    Sums are carried in float32. Where an expert has more than 16 rows its matrix is dequantised piece by piece into
    the type that the processor multiplies, bfloat16 for bfloat16 x where it has that product. On a GPU, sm_80 or newer,
    numbers are multiplied as bfloat16 or float16, exactly, and sums are scaled.

    Args:
        x: rows in ``x_order`` with ``in`` features: bfloat16 or float16, on the CPU also float32.
        weight: from :func:`moduleformer_ext.quantised.quantise`.
        layout: from :func:`~moduleformer_ext.ops.expert_layout`, for these T tokens.
        x_order, out_order, gates: as in :func:`~moduleformer_ext.ops.grouped_gemm`.
        activation: as there; a gated one needs ``out`` to be a multiple of 128.

    Returns:
        y in ``out_order``, contiguous, in x's dtype.

    Raises:
        ValueError: for what does not fit, as there, and in grad mode for x or gates that require grad.
    """
    return torch.ops.moduleformer_ext.quantised_gemm(
        x,
        *weight,
        layout.offsets,
        layout.slot_order,
        layout.position,
        layout.num_choices,
        x_order,
        out_order,
        gates,
        activation,
    )
