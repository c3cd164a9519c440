"""Routing losses of one MoE layer, made of the sums that the router already took. Each gives a scalar.

With no tokens a loss is 0 (and its gradient 0). Most are no means over tokens: of a batch that is split over processes
the mean of each process's own loss is another number. :func:`sum_over_processes` makes them those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moduleformer_ext.types import RouteTopK, RoutingSums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["concentration_loss", "mutual_information_loss", "new_expert_loss", "sum_over_processes", "switch_loss"]

ENTROPY_EPSILON = 1e-8
Z_LOSS_WEIGHT = 0.1
Route = RouteTopK | RoutingSums


def sum_over_processes(routes: Sequence[RouteTopK], group: ProcessGroup) -> list[RoutingSums]:
    """Add up what the processes of a group found for their parts of a batch, by one all-reduce for all layers.

    The losses of this module take the result in place of a route and are then those of the whole batch, the same on
    every process. The backward pass adds up over the processes too: gradients of parameters that are averaged over the
    group, as DDP and FSDP do, are those of one process with the whole batch.

    Args:
        routes: of any layers, the same ones on every process; the numbers of tokens may differ, and be 0.
        group: the processes, all of which must call this.

    Returns:
        One :class:`~moduleformer_ext.types.RoutingSums` per route, in the dtype of its ``gates``; summed in float64.
    """
    from torch.distributed import _functional_collectives as functional

    if not routes:
        return []
    parts = []
    for route in routes:
        size = route.prob_sum.new_tensor([route.logits.shape[0], route.expert_ids.numel()], dtype=torch.float64)
        sums = (route.prob_sum, route.plogp_sum, route.logsumexp_sq_sum, route.counts)
        parts.append(torch.cat([*(part.double().reshape(-1) for part in sums), size]))
    total = functional.wait_tensor(functional.all_reduce(torch.cat(parts), "sum", group))
    found = []
    for route, part in zip(routes, total.split([len(part) for part in parts]), strict=True):
        num_experts, dtype = len(route.prob_sum), route.prob_sum.dtype
        probs, plogp, squares, counts, tokens, slots = part.split([num_experts, 1, 1, num_experts, 1, 1])
        found.append(
            RoutingSums(
                probs.to(dtype),
                plogp.squeeze(0).to(dtype),
                squares.squeeze(0).to(dtype),
                counts.detach().to(dtype),
                tokens.detach().squeeze(0).clamp(min=1).to(dtype),
                slots.detach().squeeze(0).clamp(min=1).to(dtype),
            )
        )
    return found


def _tokens(route: Route) -> int | Tensor:
    return route.num_tokens if isinstance(route, RoutingSums) else max(route.logits.shape[0], 1)


def _slots(route: Route) -> int | Tensor:
    return route.num_slots if isinstance(route, RoutingSums) else max(route.expert_ids.numel(), 1)


def _marginal_entropy(route: Route) -> Tensor:
    marginal = route.prob_sum / _tokens(route)
    return -(marginal * (marginal + ENTROPY_EPSILON).log()).sum()


def mutual_information_loss(route: Route) -> Tensor:
    """H(e | x) - H(e) in nats, the negative mutual information of token and expert (ModuleFormer, eq. 7).

    -(mean over tokens of sum_e p log p) + sum_e p̄ log(p̄ + 1e-8), p̄ being the mean of p over the tokens. Minimal when
    the load is balanced over all tokens and every single token is sure of its experts.

    Args:
        route: of one layer, for all tokens of the batch, or their sums over several processes.

    Returns:
        A scalar in the dtype of ``route.prob_sum``.
    """
    return -route.plogp_sum / _tokens(route) - _marginal_entropy(route)


def concentration_loss(route: Route) -> Tensor:
    """H(e) in nats, the entropy of the mean routing distribution (ModuleFormer, eq. 8).

    -sum_e p̄ log(p̄ + 1e-8): small when few experts carry the load, so that the others can be pruned.

    Args:
        route: of one layer, for all tokens of the batch, or their sums over several processes.

    Returns:
        A scalar in the dtype of ``route.prob_sum``.
    """
    return _marginal_entropy(route)


def switch_loss(route: Route) -> Tensor:
    """Switch Transformer's load balance and the z-loss: E · sum_e P_e f_e + 0.1 · mean over tokens of logsumexp².

    P_e is the share of expert e in the probabilities, f_e its share in the slots (not differentiable).

    Args:
        route: of one layer, for all tokens of the batch, or their sums over several processes.

    Returns:
        A scalar in the dtype of ``route.prob_sum``.
    """
    tokens, slots = _tokens(route), _slots(route)
    # The published loss takes the share of slots in float32, for float64 models too.
    share = (route.counts.float() / slots).to(route.prob_sum.dtype)
    # The probabilities of a token sum to one, so P = prob_sum / tokens.
    balance = torch.dot(route.prob_sum, share) * (route.prob_sum.shape[0] / tokens)
    return balance + Z_LOSS_WEIGHT * route.logsumexp_sq_sum / tokens


def new_expert_loss(route: Route, num_new: int) -> Tensor:
    """The probability that the last ``num_new`` experts have together, averaged over tokens (cf. ModuleFormer, eq. 10).

    sum over e > E - num_new of p̄_e, in [0, 1]: small when experts that were added later leave the tokens to the
    earlier ones.

    Args:
        route: of one layer, for all tokens of the batch, or their sums over several processes.
        num_new: 0 to E.

    Returns:
        A scalar in the dtype of ``route.prob_sum``.

    Raises:
        ValueError: ``num_new`` is out of range.
    """
    num_experts = route.prob_sum.shape[0]
    if not 0 <= num_new <= num_experts:
        raise ValueError(f"new_expert_loss: num_new must be in [0, {num_experts}], got {num_new}")
    return route.prob_sum[num_experts - num_new :].sum() / _tokens(route)
