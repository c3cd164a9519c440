"""What a benchmark is made of: a cell, its contestants, the work it takes at least, and its goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Outputs = Mapping[str, Tensor]

OURS = "ours"
REFERENCE = "reference"
BEST_PEER = "best peer"
"""Stands in a goal for whichever comparable contestant was fastest."""


@dataclass(frozen=True)
class Contestant:
    """One way of computing the cell's result."""

    name: str
    run: Callable[[], Outputs]
    """The timed call. Its outputs are compared, by name, with ours."""
    prepare: Callable[[], None] | None = None
    """Untimed, before every call."""
    check: Callable[[], Outputs] | None = None
    """What to compare instead of the outputs of ``run``, where these cannot be expected to agree."""
    comparable: bool = True
    """Whether it computes the same function. A yardstick (softmax attention, say) does not: it is neither checked nor
    counted among the peers.
    """


@dataclass(frozen=True)
class Peer:
    """Another library's way."""

    bind: Callable[..., Callable[[], Tensor]]
    """Called once with the inputs of the race; gives the timed call."""
    comparable: bool = True


@dataclass(frozen=True)
class Work:
    """What any implementation has to do: the hardware's limit is the slower of the two at the measured rates."""

    dtype: torch.dtype
    flops: float = 0.0
    bytes_read: float = 0.0


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of a cell.

    ``speedup``: time of ``against`` over ours, at least ``bound``; ``roofline``: our time over the hardware's limit, at
    most ``bound``; ``memory``: our peak memory over that of ``against``, at most ``bound``.
    """

    kind: Literal["speedup", "roofline", "memory"]
    bound: float
    against: str = ""

    def __str__(self) -> str:
        if self.kind == "speedup":
            return f"≥ {self.bound:g}x {self.against}"
        if self.kind == "roofline":
            return f"≤ {self.bound:g}x roofline"
        return f"memory ≤ {self.bound:g}x {self.against}"


NOT_SLOWER = Goal("speedup", 1.0, BEST_PEER)


@dataclass(frozen=True)
class Race:
    """A cell made ready to run: tensors exist, contestants close over them. Ours comes first."""

    contestants: tuple[Contestant, ...]
    work: Work | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    """Figures that explain the timing, such as the live-tile fraction."""
    oracle: Callable[[Outputs], tuple[Outputs, Outputs]] | None = None
    """Of our outputs, a part that can be checked at little cost, and what it should be: for cells too large for a
    comparable contestant.
    """


@dataclass(frozen=True)
class Tolerance:
    """A check passes if ``quantile`` of all rows differ by at most ``relative`` (of the tensor's mean row norm).

    Where routing happens inside, a few tokens that tie at the top-k border may rightly go to different experts.
    """

    relative: float
    quantile: float = 1.0


@dataclass(frozen=True)
class Cell:
    """One line of the results."""

    section: str
    case: str
    threads: int
    build: Callable[[], Race]
    tolerance: Tolerance
    goals: tuple[Goal, ...] = ()
    tags: Mapping[str, str | int] = field(default_factory=dict)
    """What the plots group by: dtype, tokens, direction, …"""

    @property
    def key(self) -> str:
        return f"{self.section} | {self.case} | {self.threads}"


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


def forward_only(
    name: str, function: Callable[[], Tensor], *, comparable: bool = True, prepare: Callable[[], None] | None = None
) -> Contestant:
    """Times ``function`` without autograd."""

    def run() -> Outputs:
        with torch.no_grad():
            return {"y": function()}

    return Contestant(name, run, prepare=prepare, comparable=comparable)


def forward_backward(
    name: str,
    function: Callable[[], Tensor],
    leaves: Mapping[str, Tensor],
    cotangent: Tensor,
    *,
    comparable: bool = True,
    into_grad: bool = False,
) -> Contestant:
    """Times ``function`` and the gradients of ``leaves``.

    ``into_grad``: gradients are added into existing ``.grad`` buffers, as in gradient accumulation; otherwise ``.grad``
    is None beforehand, so that a gradient becomes it without a copy.
    """

    def prepare() -> None:
        for leaf in leaves.values():
            if not into_grad:
                leaf.grad = None
            elif leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            else:
                leaf.grad.zero_()

    def run() -> Outputs:
        y = function()
        y.backward(cotangent)
        gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {"y": y.detach(), **gradients}

    return Contestant(name, run, prepare=prepare, comparable=comparable)
