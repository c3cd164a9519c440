"""Matrices of experts as integers of 8 or 4 bits and their scales."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["BITS", "QuantisedMatrices", "dequantise", "quantise", "zeros"]

BITS = (8, 4)
"""What :func:`quantise` can make."""
_PANEL = 64
"""Columns that lie together in memory; csrc/quantised_gemm reads them so."""
_GROUP = 32
"""Rows that share a scale, with 4 bits."""
_DIVISORS = (-9.0, -8.5, -8.0, -7.5, -7.0, 7.0, 7.5)
"""With 4 bits, the largest number of a group divided by its scale: those that are tried."""


class QuantisedMatrices(NamedTuple):
    """One matrix [in, out] for each of E experts, W[l, n] = scale * number.

    Columns lie in panels of 64, with scales of 0 beyond ``out``. With 8 bits a column has one scale; with 4 bits every
    32 of its rows have one, and a byte holds two rows, of numbers 0 beyond ``in``.
    """

    values: Tensor
    """[E, panels, in, 64] int8; with 4 bits [E, panels, groups * 16, 64], 16 n1 + n0 + 8 of the numbers n0
    in row 2i and n1 in row 2i + 1."""
    scales: Tensor
    """[E, panels, 1, 64] float32; with 4 bits [E, panels, groups, 64] float16."""
    bits: int
    """8 or 4."""
    in_features: int
    """in."""
    out_features: int
    """out."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.values.shape[0]


pytree._register_namedtuple(QuantisedMatrices, serialized_type_name="moduleformer_ext.quantised.QuantisedMatrices")


def zeros(num_experts: int, in_features: int, out_features: int, bits: int) -> QuantisedMatrices:
    """Matrices of zeros, on the default device.

    Raises:
        ValueError: other bits than 8 or 4.
    """
    if bits not in BITS:
        raise ValueError(f"quantise: bits must be 8 or 4, got {bits}")
    panels, groups = -(-out_features // _PANEL), -(-in_features // _GROUP) if bits == 4 else 1
    rows = groups * _GROUP // 2 if bits == 4 else in_features
    return QuantisedMatrices(
        torch.zeros(num_experts, panels, rows, _PANEL, dtype=torch.int8),
        torch.zeros(num_experts, panels, groups, _PANEL, dtype=torch.float16 if bits == 4 else torch.float32),
        bits,
        in_features,
        out_features,
    )


def quantise(weight: Tensor, bits: int) -> QuantisedMatrices:
    """Round matrices to 8- or 4-bit integers, symmetrically: there is no zero point, and zeros stay zeros.

    With 8 bits the largest number of a column becomes 127. With 4 bits the scale of a group is that of a few, from its
    largest number, whose squared error is least; no data is needed.

    Args:
        weight: ``[E, in, out]``, any floating-point dtype and strides.
        bits: 8 or 4.

    Raises:
        ValueError: other bits, another shape or dtype, a number that is not finite, or with 4 bits one that float16
            scales do not reach.
    """
    if weight.dim() != 3 or 0 in weight.shape[1:] or not weight.is_floating_point():
        raise ValueError(
            f"quantise: weight must be [E, in, out] of floating-point numbers, with at least one row and column, got "
            f"{weight.dtype} of shape {list(weight.shape)}"
        )
    experts, rows, columns = weight.shape
    with weight.device:
        quantised = zeros(experts, rows, columns, bits)
    _, panels, groups, _ = quantised.scales.shape
    padding = (0, panels * _PANEL - columns, 0, groups * _GROUP - rows if bits == 4 else 0)
    # One after another: in float32 they need more memory than they leave.
    for expert, matrix in enumerate(weight.detach()):
        _check_range(matrix, bits)
        grouped = F.pad(matrix.float(), padding).view(groups, -1, panels, _PANEL).permute(2, 0, 1, 3)
        scales, numbers = _round_to_4_bits(grouped) if bits == 4 else _round_to_8_bits(grouped)
        numbers = numbers.flatten(1, 2)
        quantised.values[expert] = _pack(numbers) if bits == 4 else numbers
        quantised.scales[expert] = scales
    return quantised


def dequantise(weight: QuantisedMatrices) -> Tensor:
    """The matrices as float32 [E, in, out]."""
    numbers = weight.values if weight.bits == 8 else _unpack(weight.values)
    scales = weight.scales.float()
    rows = numbers.shape[2] if weight.bits == 8 else _GROUP
    wide = numbers.float() * scales.repeat_interleave(rows, dim=2)
    return wide.transpose(1, 2).flatten(2)[:, : weight.in_features, : weight.out_features].contiguous()


def _check_range(matrix: Tensor, bits: int) -> None:
    largest = matrix.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError("quantise: weight must be finite, got NaN or an infinite number")
    most = min(abs(divisor) for divisor in _DIVISORS) * torch.finfo(torch.float16).max
    if bits == 4 and largest > most:
        raise ValueError(f"quantise: weight must be within ±{most:g} with 4 bits, got {largest:g}")


def _round(grouped: Tensor, scale: Tensor, least: int, largest: int) -> Tensor:
    wide = scale.float()[:, :, None]
    return (grouped / wide.where(wide != 0, 1)).round_().clamp_(least, largest)


def _round_to_8_bits(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [panels, groups, 64] and numbers of weights [panels, groups, rows, 64]."""
    scale = grouped.abs().amax(2) / 127
    return scale, _round(grouped, scale, -127, 127).to(torch.int8)


def _round_to_4_bits(grouped: Tensor) -> tuple[Tensor, Tensor]:
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True)).squeeze(2)
    best_scale = torch.zeros_like(largest, dtype=torch.float16)
    best = torch.zeros_like(grouped)
    least_error = torch.full_like(largest, torch.inf)
    for divisor in _DIVISORS:
        scale = (largest / divisor).half()
        numbers = _round(grouped, scale, -8, 7)
        error = (grouped - numbers * scale.float()[:, :, None]).square().sum(2)
        better = error < least_error
        least_error = error.where(better, least_error)
        best_scale = scale.where(better, best_scale)
        best = numbers.where(better[:, :, None], best)
    return best_scale, best.to(torch.int8)


def _pack(numbers: Tensor) -> Tensor:
    """Two rows [..., 2i + (0, 1), 64] into one of bytes."""
    return 16 * numbers[..., 1::2, :] + (numbers[..., 0::2, :] + 8)


def _unpack(values: Tensor) -> Tensor:
    return torch.stack([(values & 15) - 8, values >> 4], dim=-2).flatten(-3, -2)
