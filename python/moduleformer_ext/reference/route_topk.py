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
    noise: Tensor | None
    num_sampled: int


@without_autocast
def route_topk(
    logits: Tensor, k: int, *, order: str = "softmax_topk", noise: Tensor | None = None, num_sampled: int = 0
) -> RouteTopK:
    """Choose k experts per token from logits [T, E].

    ``order="softmax_topk"`` takes gates from the softmax over all experts, without renormalising over the
    chosen ones; ``"topk_softmax"`` takes the softmax over the k chosen logits. Experts are ranked by logit,
    the lower index first among equals. With ``num_sampled = s`` the best k - s experts are followed by s
    that are sampled without replacement in proportion to p + 1e-6: those with the largest (p + 1e-6) /
    noise, ``noise`` [T, E] being draws from Exp(1).
    """
    num_experts = logits.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"route_topk: k must be in [1, {num_experts}] (the number of experts), got {k}")
    if order not in ("softmax_topk", "topk_softmax"):
        raise ValueError(f"route_topk: order must be 'softmax_topk' or 'topk_softmax', got {order!r}")
    if not 0 <= num_sampled <= k:
        raise ValueError(f"route_topk: num_sampled must be in [0, {k}] (k), got {num_sampled}")
    if (noise is None) != (num_sampled == 0):
        raise ValueError("route_topk: noise and num_sampled > 0 go together")

    logits = logits.to(accumulation_dtype(logits.dtype))
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()

    ranking = logits.detach().sort(dim=-1, descending=True, stable=True).indices
    expert_ids = ranking[:, : k - num_sampled]
    if noise is not None:
        scores = (probs.detach() + SAMPLING_FLOOR) / noise
        scores = scores.scatter(1, expert_ids, -torch.inf)
        sampled = scores.sort(dim=-1, descending=True, stable=True).indices[:, :num_sampled]
        expert_ids = torch.cat([expert_ids, sampled], dim=-1)

    chosen_logits = logits.gather(1, expert_ids)
    gates = probs.gather(1, expert_ids) if order == "softmax_topk" else chosen_logits.softmax(-1)

    slots = expert_ids.flatten()
    counts = torch.zeros(num_experts, dtype=torch.int32, device=logits.device)
    counts = counts.index_add(0, slots, torch.ones_like(slots, dtype=torch.int32))
    return RouteTopK(
        gates=gates,
        expert_ids=expert_ids.int(),
        prob_sum=probs.sum(0),
        plogp_sum=(probs * log_probs).sum(),
        logsumexp_sq_sum=logits.logsumexp(-1).square().sum(),
        counts=counts,
        logits=logits,
    )


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
