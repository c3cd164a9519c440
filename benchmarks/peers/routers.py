"""Routing as a sequence of PyTorch calls, each one a pass over memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext.types import ExpertLayout


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
