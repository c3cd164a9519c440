"""A race: one result computed in several ways, checked against ours, then timed in interleaved rounds.

pytest-benchmark times one function after another; a noisy moment of the machine would hit one of them alone. Here every
contestant runs once, then every contestant again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .machine import NO_WORK, Meter, Work

Outputs = Mapping[str, Tensor]

OURS = "ours"
REFERENCE = "reference"
BEST_PEER = "best peer"
"""In goals: whichever comparable contestant is fastest."""
LIMIT = "limit"
"""In goals: what the machine can do at best."""
MEMORY = "memory of "
"""In goals, before a contestant's name: its peak memory instead of its time."""

_COMPARED_ELEMENTS = 1 << 22
"""Of a larger tensor, evenly spaced rows are compared."""
_SLOW_SECONDS = 1.0


@dataclass(frozen=True)
class Contestant:
    """One way of computing the result."""

    name: str
    run: Callable[[], Outputs]
    """The timed call. Its outputs are compared, by name, with ours."""
    prepare: Callable[[], None] | None = None
    """Untimed, before every call."""
    check: Callable[[], Outputs] | None = None
    """What to compare instead of the outputs of `run`, where these cannot be expected to agree."""
    comparable: bool = True
    """Whether it computes the same function. A yardstick (softmax attention, say) does not: it is neither checked nor
    counted among the peers.
    """
    clocks: Callable[[], dict[str, float]] | None = None
    """What the last call took, by the clocks of the process in which it ran. None: it ran in ours; a meter tells."""

    def seconds(self, meter: Meter) -> dict[str, float]:
        """How long a call takes, the clock to be reported first."""
        ours = meter.seconds(self.prepared(self.run))
        if self.clocks is None:
            return ours
        theirs = self.clocks()
        return {clock: theirs[clock] for clock in ours}

    def prepared(self, function: Callable[[], Outputs]) -> Callable[[], Outputs]:
        if self.prepare is not None:
            self.prepare()
        return function


@dataclass(frozen=True)
class Peer:
    """Another way to compute it: a package's, or a formulation in PyTorch."""

    bind: Callable[..., Callable[[], Tensor]]
    """Called once with the inputs of a race; gives the timed call."""
    comparable: bool = True

    def bound(self, *inputs: object) -> Callable[[], Tensor]:
        """The timed call, which binds when it is first called: one that fails at that is left out like any other."""
        call: list[Callable[[], Tensor]] = []

        def run() -> Tensor:
            if not call:
                call.append(self.bind(*inputs))
            return call[0]()

        return run


@dataclass(frozen=True)
class Backward:
    """What to differentiate.

    `into_grad`: gradients are added into existing `.grad` buffers, as in gradient accumulation; otherwise `.grad` is
    None beforehand, so that a gradient becomes it without a copy.
    """

    leaves: Mapping[str, Tensor]
    cotangent: Tensor
    into_grad: bool = False

    def __post_init__(self) -> None:
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def prepare(self) -> None:
        for leaf in self.leaves.values():
            if not self.into_grad:
                leaf.grad = None
            elif leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            else:
                leaf.grad.zero_()

    def gradients(self) -> Outputs:
        return {f"d{name}": leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}


def contestant(
    name: str,
    function: Callable[[], Tensor],
    backward: Backward | None = None,
    *,
    prepare: Callable[[], None] | None = None,
    comparable: bool = True,
) -> Contestant:
    """`function` without autograd, or with the gradients of `backward`."""
    if backward is None:

        def forward() -> Outputs:
            with torch.no_grad():
                return {"y": function()}

        return Contestant(name, forward, prepare, comparable=comparable)

    def train() -> Outputs:
        y = function()
        y.backward(backward.cotangent)
        return {"y": y.detach(), **backward.gradients()}

    return Contestant(name, train, backward.prepare, comparable=comparable)


@dataclass(frozen=True)
class Tolerance:
    """A check passes if `quantile` of all rows differ by at most `relative` (of the tensor's mean row norm).

    Where routing happens inside, a few tokens that tie at the top-k border may rightly go to different experts.
    """

    relative: float
    quantile: float = 1.0


@dataclass(frozen=True)
class Race:
    """Contestants, ours first, and what is known about their task."""

    contestants: Sequence[Contestant]
    tolerance: Tolerance
    work: Work = NO_WORK
    goals: Mapping[str, float] = field(default_factory=dict)
    """A contestant's name or BEST_PEER: its time over ours, at least. LIMIT: our time over the machine's limit, at
    most. MEMORY + name: our peak memory over its own, at most. That no peer is faster is everywhere a goal.
    """
    facts: Mapping[str, float] = field(default_factory=dict)
    """Figures that explain the timing, such as the live-tile fraction."""
    oracle: Callable[[Outputs], tuple[Outputs, Outputs]] | None = None
    """Of our outputs, a part that can be checked at little cost, and what it should be: where tensors are too large for
    a comparable contestant.
    """


Run = Callable[[Race], None]
"""The fixture of conftest.py: measures a race and hands its figures to pytest-benchmark."""


@dataclass(frozen=True)
class Effort:
    """How long to time each contestant: until it had `seconds` in all, within these numbers of rounds."""

    seconds: float
    min_rounds: int
    max_rounds: int

    def enough(self, times: Sequence[float]) -> bool:
        """A contestant that takes more than `seconds` in one round has two."""
        if not times:
            return False
        least = min(2, self.min_rounds) if min(times) > self.seconds else self.min_rounds
        return len(times) >= least and (sum(times) >= self.seconds or len(times) >= self.max_rounds)


class CheckFailed(Exception):  # noqa: N818  (it is the outcome of a check, not a malfunction)
    """A contestant computed something else than ours did; no time is reported."""


@dataclass
class Measured:
    """One contestant's figures."""

    comparable: bool
    error: float | None
    """The largest relative deviation from ours that the check saw."""
    memory: int | None
    """Bytes of extra peak memory."""
    rounds: list[dict[str, float]] = field(default_factory=list)
    """Seconds by each clock of the meter."""

    @property
    def times(self) -> list[float]:
        return [next(iter(clocks.values())) for clocks in self.rounds]


def row_error(actual: Tensor, expected: Tensor, quantile: float) -> float:
    """The `quantile` over rows (last dimension) of |actual - expected| / mean row norm of `expected`."""
    if actual.shape != expected.shape:
        raise CheckFailed(f"shape {tuple(actual.shape)} where {tuple(expected.shape)} was expected")
    width = expected.shape[-1] if expected.dim() else 1
    rows_a, rows_e = actual.detach().reshape(-1, width), expected.detach().reshape(-1, width)
    step = max(1, rows_e.numel() // _COMPARED_ELEMENTS)
    rows_a, rows_e = rows_a[::step].double(), rows_e[::step].double()
    if rows_e.shape[0] == 0:
        return 0.0
    errors = (rows_a - rows_e).norm(dim=-1) / rows_e.norm(dim=-1).mean().clamp_min(1e-30)
    if not errors.isfinite().all():
        return float("inf")
    rank = min(len(errors) - 1, int(quantile * len(errors)))
    return float(errors.sort().values[rank])


def check(name: str, actual: Outputs, expected: Outputs, tolerance: Tolerance) -> float:
    """Compare the outputs that both have. Returns the largest error; raises CheckFailed."""
    shared = [key for key in expected if key in actual]
    if not shared:
        raise CheckFailed(f"{name} has no output in common with what is expected")
    worst = 0.0
    for key in shared:
        error = row_error(actual[key], expected[key], tolerance.quantile)
        if not error <= tolerance.relative:
            raise CheckFailed(f"{name}: {key} deviates by {error:.2g}, allowed {tolerance.relative:g}")
        worst = max(worst, error)
    return worst


def _first_runs(contestant: Contestant, meter: Meter) -> tuple[Outputs, int | None]:
    """What is to be checked, and the memory that a call needs. Warms up.

    A first call also brings in the code of libraries and their lasting buffers, some MB of them. So a second one is
    measured, unless that takes long: such a contestant needs so much that they do not matter.
    """
    results: list[Outputs] = []
    checked: Outputs | None = None
    if contestant.check is not None:
        checked = {key: tensor.clone() for key, tensor in contestant.prepared(contestant.check)().items()}
    for _ in range(2):
        results.clear()
        run = contestant.prepared(contestant.run)
        start = time.process_time()
        memory = meter.peak_bytes(lambda run=run: results.append(run()))
        if time.process_time() - start > _SLOW_SECONDS:
            break
    return results[0] if checked is None else checked, None if contestant.clocks is not None else memory


def check_all(race: Race, meter: Meter) -> tuple[dict[str, Measured], dict[str, str]]:
    """Run and check every contestant. Returns those that ran, by name, and of the others why they did not: other
    libraries do not serve every device, type and shape.
    """
    ours, *others = race.contestants
    assert ours.name == OURS
    outputs, memory = _first_runs(ours, meter)
    expected = {key: tensor.clone() for key, tensor in outputs.items()}  # .grad buffers get written again
    del outputs
    error = check(OURS, *race.oracle(expected), race.tolerance) if race.oracle is not None else 0.0
    ran, left_out = {OURS: Measured(True, error, memory)}, {}
    for contestant in others:
        try:
            outputs, memory = _first_runs(contestant, meter)
        except Exception as failure:
            left_out[contestant.name] = reason(failure)
            continue
        error = check(contestant.name, outputs, expected, race.tolerance) if contestant.comparable else None
        del outputs
        ran[contestant.name] = Measured(contestant.comparable, error, memory)
    return ran, left_out


def reason(failure: Exception) -> str:
    """Why a candidate was left out, in a line."""
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def measure(race: Race, meter: Meter, effort: Effort) -> tuple[dict[str, Measured], dict[str, str]]:
    """Check, then time. Raises CheckFailed before anything is timed. A peer that fails later on is left out, too."""
    ran, left_out = check_all(race, meter)
    running = [contestant for contestant in race.contestants if contestant.name in ran]
    while pending := [contestant for contestant in running if not effort.enough(ran[contestant.name].times)]:
        for contestant in pending:
            try:
                ran[contestant.name].rounds.append(contestant.seconds(meter))
            except Exception as failure:
                if contestant.name == OURS:
                    raise
                left_out[contestant.name] = reason(failure)
                del ran[contestant.name]
                running.remove(contestant)
    return ran, left_out
