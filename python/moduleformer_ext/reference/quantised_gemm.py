"""Plain-PyTorch twin of :mod:`moduleformer_ext.ops.quantised_gemm`."""

from __future__ import annotations

from torch import Tensor

from moduleformer_ext.quantised import QuantisedMatrices, dequantise
from moduleformer_ext.reference._common import accumulation_dtype
from moduleformer_ext.reference.grouped_gemm import grouped_gemm
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
    """grouped_gemm with the dequantised matrices."""
    wide = dequantise(weight).to(accumulation_dtype(x.dtype))
    wide_x = x.to(wide.dtype)
    y = grouped_gemm(wide_x, wide, layout, x_order=x_order, out_order=out_order, gates=gates, activation=activation)
    return y.to(x.dtype)
