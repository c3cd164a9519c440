"""Routing as a sequence of PyTorch calls, each one a pass over memory, and expert products without a kernel for them.

Every way of multiplying is a function ``(rows [S, in], weight [E, in, out], layout) -> [S, out]`` on rows that are
already sorted by expert; the layers around them (:func:`ffn`, :func:`moa_map`, :func:`moa_reduce`) gather, gate and
sum alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext.types import ExpertLayout

from ..race import REFERENCE, Peer
from . import jetmoe

ExpertProduct = Callable[[Tensor, Tensor, ExpertLayout], Tensor]


class Routing(NamedTuple):
    """What the layers and the losses need."""

    gates: Tensor
    expert_ids: Tensor
    prob_sum: Tensor
    plogp_sum: Tensor
    logsumexp_sq_sum: Tensor


def mlp_logits(x: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor:
    """x [T, D] -> logits [T, E] in x's type."""
    return F.linear(F.gelu(F.linear(x, hidden_weight, hidden_bias)), weight)


def route(logits: Tensor, k: int) -> Routing:
    """Softmax over all experts, top-k without renormalisation, and the sums of the losses."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    gates, expert_ids = probs.topk(k, dim=-1)
    return Routing(
        gates,
        expert_ids,
        probs.sum(0),
        (probs * log_probs).sum(),
        logits.logsumexp(-1).square().sum(),
    )


def sorted_layout(expert_ids: Tensor, num_experts: int) -> ExpertLayout:
    """Slots by expert, through a stable comparison sort."""
    slots = expert_ids.flatten()
    slot_order = slots.argsort(stable=True)
    position = torch.empty_like(slot_order)
    position[slot_order] = torch.arange(len(slots), device=slots.device)
    counts = slots.bincount(minlength=num_experts).int()
    offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return ExpertLayout(counts, offsets, slot_order.int(), position.int(), expert_ids.shape[1])


def mutual_information_loss(routing: Routing, tokens: int) -> Tensor:
    """H(e | x) - H(e)."""
    marginal = routing.prob_sum / tokens
    entropy = -(marginal * (marginal + 1e-8).log()).sum()
    return -routing.plogp_sum / tokens - entropy


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


def ffn_peers(*, jetmoe_experts: bool = True) -> dict[str, Peer]:
    """Of x [T, D], up [E, D, F], down [E, F, D], a layout and gates [T, K]; results are x's shape."""
    products = {**PRODUCTS, "JetMoE": jetmoe.expert_product} if jetmoe_experts and jetmoe.AVAILABLE else PRODUCTS
    peers = {name: Peer(partial(partial, ffn, product)) for name, product in products.items()}
    try:
        from scattermoe.parallel_experts import parallel_linear
    except ImportError:
        return peers

    def scattermoe(x: Tensor, up: Tensor, down: Tensor, layout: ExpertLayout, gates: Tensor) -> Callable[[], Tensor]:
        experts = torch.arange(layout.num_experts, device=x.device)
        expert_of_place = experts.repeat_interleave(layout.counts, output_size=layout.num_slots)
        routing = expert_of_place, layout.slot_order.long(), layout.offsets[1:].long()

        def call() -> Tensor:
            hidden = parallel_linear(x, up, layout.num_choices, *routing, grouped_out=True)
            hidden = F.gelu(hidden, approximate="tanh")
            return parallel_linear(hidden, down, 1, *routing, gates=gates.to(x.dtype), grouped_in=True)

        return call

    return {**peers, "scattermoe (Triton)": Peer(scattermoe)}


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
