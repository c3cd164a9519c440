"""Experts that other processes hold: what the layers ask of whatever takes tokens to them and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from moduleformer_ext import ops
from moduleformer_ext.types import ExpertLayout, RouteTopK, Segments

__all__ = ["Dispatch", "Exchange", "arrange"]


class Dispatch(ABC):
    """The slots of a routing whose experts are spread over processes, in place of an ``ExpertLayout``."""

    @abstractmethod
    def apply(
        self,
        compute: Callable[..., Tensor],
        x: Tensor,
        weights: Sequence[Segments],
        *,
        x_order: str = "token",
        out_order: str = "token",
        gates: Tensor | None = None,
    ) -> Tensor:
        """Every slot's row through its expert, on the process that holds it; all processes together.

        Args:
            compute: ``compute(rows, *own, layout) -> [R, m]`` for R rows ``[R, n]`` in the order of tokens, each a
                token of one choice, with the parts of the weights that this process holds.
            x: this process's rows, in ``x_order``.
            weights: all experts' parameters, in the form that this dispatch gave them.
            x_order, out_order, gates: as in :func:`moduleformer_ext.ops.grouped_gemm`.
        """


Exchange = Callable[[Tensor], Dispatch]
"""Arranges the expert_ids [T, K] of a router."""


def arrange(route: RouteTopK, exchange: Exchange | None) -> ExpertLayout | Dispatch:
    """The slots of a routing by expert: here, or where an exchange has the experts."""
    if exchange is not None:
        return exchange(route.expert_ids)
    return ops.expert_layout(route.expert_ids, route.counts.shape[0])
