"""Routing losses of one MoE layer, from the logits themselves. Each gives a scalar, 0 with no tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moduleformer_ext.reference._common import without_autocast
from moduleformer_ext.types import RouteTopK

ENTROPY_EPSILON = 1e-8
Z_LOSS_WEIGHT = 0.1


def _mean(values: Tensor) -> Tensor:
    """The mean over tokens, the first dimension."""
    return values.sum(0) / max(values.shape[0], 1)


def _marginal_entropy(probs: Tensor) -> Tensor:
    marginal = _mean(probs)
    return -(marginal * (marginal + ENTROPY_EPSILON).log()).sum()


@without_autocast
def mutual_information_loss(route: RouteTopK) -> Tensor:
    """H(e | x) - H(e), the negative mutual information of token and expert: balanced overall, certain for
    each token.
    """
    log_probs = route.logits.log_softmax(-1)
    probs = log_probs.exp()
    conditional_entropy = _mean(-(probs * log_probs).sum(-1))
    return conditional_entropy - _marginal_entropy(probs)


@without_autocast
def concentration_loss(route: RouteTopK) -> Tensor:
    """H(e), the entropy of the mean routing distribution: small when few experts carry the load."""
    return _marginal_entropy(route.logits.softmax(-1))


@without_autocast
def switch_loss(route: RouteTopK) -> Tensor:
    """E · Σ_e (share of probability of e) · (share of slots of e) + 0.1 · mean logsumexp²."""
    mass = route.logits.softmax(-1).sum(0)
    slots = route.counts.float()  # the published loss takes this share in float32, for float64 models too
    if len(route.logits) == 0:  # of nothing there are no shares
        return mass.sum()
    balance = route.logits.shape[-1] * (mass / mass.sum() * (slots / slots.sum())).sum()
    return balance + Z_LOSS_WEIGHT * _mean(torch.logsumexp(route.logits, -1).square())


@without_autocast
def new_expert_loss(route: RouteTopK, num_new: int) -> Tensor:
    """Σ over the last num_new experts of their mean probability."""
    probs = route.logits.softmax(-1)
    return _mean(probs[:, probs.shape[-1] - num_new :].sum(-1))
