"""Quantised expert matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moduleformer_ext import ops
from moduleformer_ext.quantised import QuantisedMatrices, zeros
from moduleformer_ext.types import ExpertLayout


class QuantisedExpertLinear(nn.Module):
    """:class:`~moduleformer_ext.nn.ExpertLinear` with matrices of 8 or 4 bits, for inference.

    Numbers and scales are buffers; converting the module's dtype leaves them as they are. A new one's are zeros.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, num_experts: int, in_features: int, out_features: int, bits: int) -> None:
        super().__init__()
        self.bits, self.in_features, self.out_features = bits, in_features, out_features
        matrices = zeros(num_experts, in_features, out_features, bits)
        self.register_buffer("values", matrices.values)
        self.register_buffer("scales", matrices.scales)

    @property
    def weight(self) -> QuantisedMatrices:
        """The matrices as the op takes them."""
        return QuantisedMatrices(self.values, self.scales, self.bits, self.in_features, self.out_features)

    def forward(
        self,
        x: Tensor,
        layout: ExpertLayout,
        *,
        x_order: str = "token",
        out_order: str = "expert",
        gates: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """The products of all slots; see :func:`moduleformer_ext.ops.quantised_gemm`."""
        return ops.quantised_gemm(
            x, self.weight, layout, x_order=x_order, out_order=out_order, gates=gates, activation=activation
        )

    def extra_repr(self) -> str:
        return (
            f"num_experts={len(self.values)}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedExpertLinear:
        scales = self.scales
        integers = torch.int32 if scales.dtype == torch.float32 else torch.int16  # of the same size, which to() keeps
        self._buffers["scales"] = scales.view(integers)
        super()._apply(fn, recurse)
        self._buffers["scales"] = self.scales.view(scales.dtype)
        return self
