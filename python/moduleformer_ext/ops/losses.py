"""Routing losses of one MoE layer, made of the sums that the router already took. Each gives a scalar.

With no tokens a loss is 0 (and its gradient 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moduleformer_ext.types import RouteTopK

__all__ = ["concentration_loss", "mutual_information_loss", "new_expert_loss", "switch_loss"]

ENTROPY_EPSILON = 1e-8
Z_LOSS_WEIGHT = 0.1


def _tokens(route: RouteTopK) -> int:
    return max(route.logits.shape[0], 1)


def _marginal_entropy(route: RouteTopK) -> Tensor:
    marginal = route.prob_sum / _tokens(route)
    return -(marginal * (marginal + ENTROPY_EPSILON).log()).sum()


def mutual_information_loss(route: RouteTopK) -> Tensor:
    """H(e | x) - H(e) in nats, the negative mutual information of token and expert (ModuleFormer, eq. 7).

    -(mean over tokens of sum_e p log p) + sum_e p̄ log(p̄ + 1e-8), p̄ being the mean of p over the tokens. Minimal when
    the load is balanced over all tokens and every single token is sure of its experts.

    Args:
        route: of one layer, for all tokens of the batch.

    Returns:
        A scalar in the dtype of ``route.gates``.
    """
    return -route.plogp_sum / _tokens(route) - _marginal_entropy(route)


def concentration_loss(route: RouteTopK) -> Tensor:
    """H(e) in nats, the entropy of the mean routing distribution (ModuleFormer, eq. 8).

    -sum_e p̄ log(p̄ + 1e-8): small when few experts carry the load, so that the others can be pruned.

    Args:
        route: of one layer, for all tokens of the batch.

    Returns:
        A scalar in the dtype of ``route.gates``.
    """
    return _marginal_entropy(route)


def switch_loss(route: RouteTopK) -> Tensor:
    """Switch Transformer's load balance and the z-loss: E · sum_e P_e f_e + 0.1 · mean over tokens of logsumexp².

    P_e is the share of expert e in the probabilities, f_e its share in the slots (not differentiable).

    Args:
        route: of one layer, for all tokens of the batch.

    Returns:
        A scalar in the dtype of ``route.gates``.
    """
    tokens, slots = _tokens(route), max(route.expert_ids.numel(), 1)
    # The published loss takes the share of slots in float32, for float64 models too.
    share = (route.counts.float() / slots).to(route.prob_sum.dtype)
    # The probabilities of a token sum to one, so P = prob_sum / tokens.
    balance = torch.dot(route.prob_sum, share) * (route.prob_sum.shape[0] / tokens)
    return balance + Z_LOSS_WEIGHT * route.logsumexp_sq_sum / tokens


def new_expert_loss(route: RouteTopK, num_new: int) -> Tensor:
    """The probability that the last ``num_new`` experts have together, averaged over tokens (cf. ModuleFormer, eq. 10).

    sum over e > E - num_new of p̄_e, in [0, 1]: small when experts that were added later leave the tokens to the
    earlier ones.

    Args:
        route: of one layer, for all tokens of the batch.
        num_new: 0 to E.

    Returns:
        A scalar in the dtype of ``route.gates``.

    Raises:
        ValueError: ``num_new`` is out of range.
    """
    num_experts = route.prob_sum.shape[0]
    if not 0 <= num_new <= num_experts:
        raise ValueError(f"new_expert_loss: num_new must be in [0, {num_experts}], got {num_new}")
    return route.prob_sum[num_experts - num_new :].sum() / _tokens(route)
