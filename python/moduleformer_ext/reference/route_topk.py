"""Routers: gate network, softmax over all experts, top-k, and the sums for the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext.reference._common import accumulation_dtype, joined, without_autocast
from moduleformer_ext.types import RouteTopK, Segments

if TYPE_CHECKING:
    from typing_extensions import Unpack

SAMPLING_FLOOR = 1e-6
"""Added to every probability before sampling, so that an expert whose probability underflowed can still be
drawn.
"""


class Choice(TypedDict, total=False):
    """Keyword arguments of :func:`route_topk`, which explains them; the gate networks pass them on."""

    order: str
    scale: float
    noise: Tensor | None
    num_sampled: int
    selection_bias: Tensor | None
    num_groups: int
    top_groups: int
    scored_per_group: int


ORDERS = ("softmax_topk", "topk_softmax", "sigmoid_topk", "sigmoid_topk_renormalised")

SUM_FLOOR = 1e-20
"""Added to the sum that sigmoid gates are divided by."""


@without_autocast
def route_topk(
    logits: Tensor,
    k: int,
    *,
    order: str = "softmax_topk",
    scale: float = 1.0,
    noise: Tensor | None = None,
    num_sampled: int = 0,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scored_per_group: int = 2,
) -> RouteTopK:
    """Choose k experts per token from logits [T, E].

    ``order="softmax_topk"`` takes gates from the softmax over all experts, without renormalising over the
    chosen ones; ``"topk_softmax"`` takes the softmax over the k chosen logits; ``"sigmoid_topk"`` the sigmoids
    of these, and ``"sigmoid_topk_renormalised"`` divides them by their sum. All are multiplied by ``scale``.

    Experts are ranked by logit, the lower index first among equals; with ``selection_bias`` [E] by their softmax
    or sigmoid plus that. If ``top_groups < num_groups``, only experts of the best groups can be chosen, a group
    being as good as the sum of the ``scored_per_group`` best of its experts.

    With ``num_sampled = s`` the best k - s experts are followed by s that are sampled without replacement in
    proportion to p + 1e-6: those with the largest (p + 1e-6) / noise, ``noise`` [T, E] being draws from Exp(1).
    """
    num_experts = logits.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"route_topk: k must be in [1, {num_experts}] (the number of experts), got {k}")
    if order not in ORDERS:
        raise ValueError(f"route_topk: order must be one of {', '.join(ORDERS)}, got {order!r}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"route_topk: num_groups must divide the {num_experts} experts, got {num_groups}")
    if not 1 <= top_groups <= num_groups or top_groups * (num_experts // num_groups) < k:
        raise ValueError(
            f"route_topk: top_groups must be in [1, {num_groups}] (num_groups) and leave k experts, got {top_groups}"
        )
    if scored_per_group not in (1, 2):
        raise ValueError(f"route_topk: scored_per_group must be 1 or 2, got {scored_per_group}")
    if not 0 <= num_sampled <= k:
        raise ValueError(f"route_topk: num_sampled must be in [0, {k}] (k), got {num_sampled}")
    if (noise is None) != (num_sampled == 0):
        raise ValueError("route_topk: noise and num_sampled > 0 go together")
    by_score = selection_bias is not None or top_groups < num_groups
    if num_sampled and (by_score or order.startswith("sigmoid")):
        raise ValueError(
            f"route_topk: num_sampled must be 0 with sigmoids, selection_bias or groups left out, got {num_sampled}"
        )

    logits = logits.to(accumulation_dtype(logits.dtype))
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()

    scores = logits.sigmoid() if order.startswith("sigmoid") else probs
    ranked = logits.detach()
    if by_score:
        ranked = scores.detach() + (0 if selection_bias is None else selection_bias.to(scores.dtype))
    if top_groups < num_groups:
        expert_ids = _best_of_groups(ranked, k, num_groups, top_groups, scored_per_group)
    else:
        expert_ids = _best_first(ranked)[:, : k - num_sampled]
    if noise is not None:
        drawn = (probs.detach() + SAMPLING_FLOOR) / noise
        sampled = _best_first(drawn.scatter(1, expert_ids, -torch.inf))[:, :num_sampled]
        expert_ids = torch.cat([expert_ids, sampled], dim=-1)

    gates = logits.gather(1, expert_ids).softmax(-1) if order == "topk_softmax" else scores.gather(1, expert_ids)
    if order == "sigmoid_topk_renormalised":
        gates = gates / (gates.sum(-1, keepdim=True) + SUM_FLOOR)

    slots = expert_ids.flatten()
    counts = torch.zeros(num_experts, dtype=torch.int32, device=logits.device)
    counts = counts.index_add(0, slots, torch.ones_like(slots, dtype=torch.int32))
    return RouteTopK(
        gates=gates * scale,
        expert_ids=expert_ids.int(),
        prob_sum=probs.sum(0),
        plogp_sum=(probs * log_probs).sum(),
        logsumexp_sq_sum=logits.logsumexp(-1).square().sum(),
        counts=counts,
        logits=logits,
    )


def _best_first(values: Tensor) -> Tensor:
    """Indices by falling value, the lower one first among equals, NaN first of all."""
    return values.sort(dim=-1, descending=True, stable=True).indices


def _best_of_groups(ranked: Tensor, k: int, num_groups: int, top_groups: int, scored_per_group: int) -> Tensor:
    """The k best experts [T, k] of the best groups."""
    tokens, num_experts = ranked.shape
    grouped = ranked.view(tokens, num_groups, num_experts // num_groups)
    best = grouped.gather(2, _best_first(grouped)[..., :scored_per_group])
    groups = _best_first(best.sum(-1))[:, :top_groups].sort(-1).values
    left = torch.arange(num_experts, device=ranked.device).view(num_groups, -1)[groups].flatten(1)
    return left.gather(1, _best_first(ranked.gather(1, left))[:, :k])


@without_autocast
def route_topk_linear(
    x: Tensor,
    weight: Segments,
    k: int,
    **choice: Unpack[Choice],
) -> RouteTopK:
    """Route x [T, D] with logits = x Wᵀ, weight [E, D]."""
    dtype = accumulation_dtype(x.dtype)
    logits = F.linear(x.to(dtype), joined(weight).to(dtype))
    return route_topk(logits, k, **choice)


@without_autocast
def route_topk_mlp(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    weight: Segments,
    k: int,
    **choice: Unpack[Choice],
) -> RouteTopK:
    """Route x [T, D] with logits = gelu(x Vᵀ + b) Wᵀ (erf GELU), hidden_weight V [G, D], hidden_bias b [G],
    weight W [E, G].
    """
    dtype = accumulation_dtype(x.dtype)
    hidden = F.gelu(F.linear(x.to(dtype), hidden_weight.to(dtype), hidden_bias.to(dtype)))
    return route_topk_linear(hidden, weight, k, **choice)


@without_autocast
def route_topk_gmm(
    x: Tensor,
    hidden_weight: Tensor,
    centroids: Segments,
    temperature: Tensor,
    k: int,
    **choice: Unpack[Choice],
) -> RouteTopK:
    """Route x [T, D] by cosine similarity: logits = exp(temperature) · normalize(x Vᵀ) ·
    normalize(centroids)ᵀ.

    hidden_weight V [G, D], centroids [E, G], temperature [] (or one element).
    """
    dtype = accumulation_dtype(x.dtype)
    direction = F.normalize(F.linear(x.to(dtype), hidden_weight.to(dtype)), dim=-1)
    centre = F.normalize(joined(centroids).to(dtype), dim=-1)
    logits = F.linear(direction, centre) * temperature.to(dtype).reshape(()).exp()
    return route_topk(logits, k, **choice)
