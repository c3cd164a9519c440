"""Matrices of experts as integers of 8 or 4 bits and their scales."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["BITS", "QuantisedMatrices", "dequantise", "quantise"]

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

    Columns lie in panels of 64, with scales of 0 beyond ``out``. With 8 bits a column has one scale, with 4 bits one for
    every 32 of its rows, and a byte holds two rows, of numbers 0 beyond ``in``.
    """

    values: Tensor
    """[E, panels, in, 64] int8; with 4 bits [E, panels, groups * 16, 64]: numbers + 8, row 2i in the low
    half of a byte."""
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


def quantise(weight: Tensor, bits: int) -> QuantisedMatrices:
    """Round matrices to 8- or 4-bit integers, symmetrically: there is no zero point, and zeros stay zeros.

    With 8 bits the largest number of a column becomes 127. With 4 bits the scale of a group is that of a few, from its
    largest number, whose squared error is least; no data is needed.

    Args:
        weight: ``[E, in, out]``, any floating-point dtype and strides.
        bits: 8 or 4.

    Raises:
        ValueError: other bits, another shape or dtype, or a number that is not finite.
    """
    if bits not in BITS:
        raise ValueError(f"quantise: bits must be 8 or 4, got {bits}")
    if weight.dim() != 3 or 0 in weight.shape[1:] or not weight.is_floating_point():
        raise ValueError(
            f"quantise: weight must be [E, in, out] of floating-point numbers, with at least one row and column, got "
            f"{weight.dtype} of shape {list(weight.shape)}"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("quantise: weight must be finite, got NaN or an infinite number")
    _, rows, columns = weight.shape
    panels = -(-columns // _PANEL)
    groups = 1 if bits == 8 else -(-rows // _GROUP)
    values, scales = [], []
    for matrix in weight.detach().unbind():  # one after another: in float32 they need twice the memory
        padded = F.pad(matrix.float(), (0, panels * _PANEL - columns, 0, 0 if bits == 8 else groups * _GROUP - rows))
        grouped = padded.view(groups, -1, panels, _PANEL).permute(2, 0, 1, 3)  # [panels, groups, rows, 64]
        scale, numbers = _round_to_8_bits(grouped) if bits == 8 else _round_to_4_bits(grouped)
        numbers = numbers.flatten(1, 2)
        values.append(numbers if bits == 8 else _pack(numbers))
        scales.append(scale)
    shape = (0, panels, rows if bits == 8 else groups * _GROUP // 2, _PANEL)
    return QuantisedMatrices(
        torch.stack(values) if values else weight.new_empty(shape, dtype=torch.int8),
        torch.stack(scales) if scales else weight.new_empty((0, panels, groups, _PANEL), dtype=_scale_dtype(bits)),
        bits,
        rows,
        columns,
    )


def dequantise(weight: QuantisedMatrices) -> Tensor:
    """The matrices as float32 [E, in, out]."""
    numbers = weight.values if weight.bits == 8 else _unpack(weight.values)
    scales = weight.scales.float()
    rows = numbers.shape[2] if weight.bits == 8 else _GROUP
    wide = numbers.float() * scales.repeat_interleave(rows, dim=2)
    return wide.transpose(1, 2).flatten(2)[:, : weight.in_features, : weight.out_features].contiguous()


def _scale_dtype(bits: int) -> torch.dtype:
    return torch.float32 if bits == 8 else torch.float16


def _round(grouped: Tensor, scale: Tensor, least: int, largest: int) -> Tensor:
    wide = scale.float()[:, :, None]
    return (grouped / wide.where(wide != 0, 1)).round_().clamp_(least, largest)


def _round_to_8_bits(grouped: Tensor) -> tuple[Tensor, Tensor]:
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
    halves = (numbers + 8).view(torch.uint8)
    return (halves[..., 0::2, :] | (halves[..., 1::2, :] << 4)).view(torch.int8)


def _unpack(values: Tensor) -> Tensor:
    both = values.view(torch.uint8)
    return torch.stack([both & 15, both >> 4], dim=-2).flatten(-3, -2).to(torch.int8) - 8
