"""Expert products without a kernel for them.

Every way of multiplying is a function ``(rows [S, in], weight [E, in, out], layout) -> [S, out]`` on rows that are
already sorted by expert; the layers around them (:func:`ffn`, :func:`moa_map`, :func:`moa_reduce`) gather, gate and
sum alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext.types import ExpertLayout

from ..cells import REFERENCE

ExpertProduct = Callable[[Tensor, Tensor, ExpertLayout], Tensor]


class _LoopProduct(torch.autograd.Function):
    """One product per expert, forward and backward, written into whole buffers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sizes = sizes
        y = rows.new_empty(rows.shape[0], weight.shape[-1])
        for part, w, out in zip(rows.split(sizes), weight, y.split(sizes), strict=True):
            torch.mm(part, w, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        d_rows, d_weight = torch.empty_like(rows), torch.empty_like(weight)
        split_rows = zip(rows.split(ctx.sizes), dy.split(ctx.sizes), d_rows.split(ctx.sizes), strict=True)
        for (part, d_part, out), w, d_w in zip(split_rows, weight, d_weight, strict=True):
            torch.mm(d_part, w.t(), out=out)
            torch.mm(part.t(), d_part, out=d_w)
        return d_rows, d_weight, None


def loop_product(rows: Tensor, weight: Tensor, layout: ExpertLayout) -> Tensor:
    """The reference formulation: a Python loop over the experts."""
    return _LoopProduct.apply(rows, weight, layout.counts.tolist())


def grouped_mm_product(rows: Tensor, weight: Tensor, layout: ExpertLayout) -> Tensor:
    """PyTorch's own grouped product."""
    return F.grouped_mm(rows, weight, offs=layout.offsets[1:])


def padded_bmm_product(rows: Tensor, weight: Tensor, layout: ExpertLayout) -> Tensor:
    """Every expert's rows padded to the fullest one's, then one batched product."""
    experts, longest = weight.shape[0], int(layout.counts.max())
    expert = torch.repeat_interleave(
        torch.arange(experts, device=rows.device), layout.counts, output_size=rows.shape[0]
    )
    place = expert * longest + torch.arange(rows.shape[0], device=rows.device) - layout.offsets[expert]
    padded = rows.new_zeros(experts * longest, rows.shape[-1]).index_copy(0, place, rows)
    return torch.bmm(padded.unflatten(0, (experts, longest)), weight).flatten(0, 1)[place]


PRODUCTS: dict[str, ExpertProduct] = {
    REFERENCE: loop_product,
    "grouped_mm": grouped_mm_product,
    "padded bmm": padded_bmm_product,
}
"""The peers of every expert benchmark, by the names they are reported under."""


def _gated_sum(y: Tensor, gates: Tensor, layout: ExpertLayout) -> Tensor:
    token = layout.slot_order // layout.num_choices
    weighted = y * gates.flatten()[layout.slot_order][:, None].to(y.dtype)
    return y.new_zeros(gates.shape[0], y.shape[-1]).index_add(0, token, weighted)


def ffn(product: ExpertProduct, x: Tensor, up: Tensor, down: Tensor, layout: ExpertLayout, gates: Tensor) -> Tensor:
    """Gather, up, tanh-GELU, down, gate, sum over k. x [T, D] -> [T, D]."""
    hidden = F.gelu(product(x[layout.slot_order // layout.num_choices], up, layout), approximate="tanh")
    return _gated_sum(product(hidden, down, layout), gates, layout)


def moa_map(product: ExpertProduct, x: Tensor, weight: Tensor, layout: ExpertLayout) -> Tensor:
    """Gather, expert product, back to the order of tokens. x [T, D] -> [T, K, A]."""
    y = product(x[layout.slot_order // layout.num_choices], weight, layout)
    return y[layout.position].unflatten(0, (x.shape[0], layout.num_choices))


def moa_reduce(product: ExpertProduct, heads: Tensor, weight: Tensor, layout: ExpertLayout, gates: Tensor) -> Tensor:
    """Gather, expert product, gate, sum over k. heads [T, K, A] -> [T, D]."""
    return _gated_sum(product(heads.flatten(0, 1)[layout.slot_order], weight, layout), gates, layout)
