"""Checks, then times the contestants of a cell against one another.

Rounds are interleaved (every contestant once, then every contestant again), so that a noisy moment of the machine hits
all of them. With one thread, CPU time is reported: it does not see other processes. With more, wall time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .cells import BEST_PEER, OURS, Cell, Contestant, Goal, Outputs, Race, Tolerance
from .machine import CpuMeter, Limits

_COMPARED_ELEMENTS = 1 << 22
"""Of a larger tensor, evenly spaced rows are compared."""
_SLOW_SECONDS = 1.0


@dataclass(frozen=True)
class Effort:
    """How long to measure each contestant: until it had ``seconds`` in all, within these numbers of rounds."""

    seconds: float = 1.0
    min_rounds: int = 3
    max_rounds: int = 15
    slow_rounds: int = 2
    """The least for a contestant that takes more than ``seconds`` in one round."""

    def enough(self, times: Sequence[float]) -> bool:
        if not times:
            return False
        least = self.slow_rounds if min(times) > self.seconds else self.min_rounds
        return len(times) >= least and (sum(times) >= self.seconds or len(times) >= self.max_rounds)


class Meter(Protocol):
    """How a call is measured."""

    def seconds(self, run: Callable[[], object]) -> float:
        """How long ``run`` takes. What it returns is freed outside of that time."""

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """How much more memory than before ``run`` needs at its peak; None where that cannot be told."""


class CheckFailed(Exception):  # noqa: N818  (it is the outcome of a check, not a malfunction)
    """A contestant computed something else than ours did; no time is reported."""


@dataclass
class Timing:
    """One contestant's figures. Seconds per call; bytes of extra peak memory."""

    median: float
    low: float
    high: float
    rounds: int
    memory: int | None
    comparable: bool
    error: float | None
    """The largest relative deviation from ours that the check saw."""


@dataclass
class GoalOutcome:
    goal: str
    value: float | None
    met: bool | None
    missed_by: float | None
    """By which factor, 1.1 = ten percent short."""


@dataclass
class CellResult:
    """One line of the report."""

    key: str
    section: str
    case: str
    threads: int
    tags: dict[str, str | int]
    timings: dict[str, Timing] = field(default_factory=dict)
    roofline_seconds: float | None = None
    facts: dict[str, float] = field(default_factory=dict)
    goals: list[GoalOutcome] = field(default_factory=list)
    failure: str | None = None

    def ratio(self, name: str) -> float | None:
        """How many times longer ``name`` takes than ours."""
        ours, other = self.timings.get(OURS), self.timings.get(name)
        return other.median / ours.median if ours and other else None

    @property
    def best_peer(self) -> str | None:
        peers = {name: t.median for name, t in self.timings.items() if t.comparable and not name.startswith(OURS)}
        return min(peers, key=lambda name: peers[name]) if peers else None

    @property
    def roofline_ratio(self) -> float | None:
        ours = self.timings.get(OURS)
        return ours.median / self.roofline_seconds if ours and self.roofline_seconds else None

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> CellResult:
        timings = {name: Timing(**timing) for name, timing in data.pop("timings").items()}
        goals = [GoalOutcome(**goal) for goal in data.pop("goals")]
        return cls(timings=timings, goals=goals, **data)


def row_error(actual: Tensor, expected: Tensor, quantile: float) -> float:
    """The ``quantile`` over rows (last dimension) of |actual - expected| / mean row norm of ``expected``."""
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
    """Compare the outputs that both have. Returns the largest error; raises :class:`CheckFailed`."""
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
        if contestant.prepare is not None:
            contestant.prepare()
        checked = {key: tensor.clone() for key, tensor in contestant.check().items()}
    for _ in range(2):
        results.clear()
        if contestant.prepare is not None:
            contestant.prepare()
        start = time.process_time()
        memory = meter.peak_bytes(lambda: results.append(contestant.run()))
        if time.process_time() - start > _SLOW_SECONDS:
            break
    return results[0] if checked is None else checked, memory


def _timed(contestant: Contestant, meter: Meter) -> float:
    if contestant.prepare is not None:
        contestant.prepare()
    return meter.seconds(contestant.run)


def check_all(race: Race, tolerance: Tolerance, meter: Meter) -> dict[str, tuple[float | None, int | None]]:
    """Run every contestant once. Returns name -> (deviation from ours, peak memory)."""
    ours, *others = race.contestants
    outputs, memory = _first_runs(ours, meter)
    expected = {key: tensor.clone() for key, tensor in outputs.items()}  # .grad buffers get written again
    del outputs
    error = 0.0
    if race.oracle is not None:
        part, wanted = race.oracle(expected)
        error = check("ours", part, wanted, tolerance)
    seen: dict[str, tuple[float | None, int | None]] = {ours.name: (error, memory)}
    for contestant in others:
        outputs, memory = _first_runs(contestant, meter)
        error = check(contestant.name, outputs, expected, tolerance) if contestant.comparable else None
        del outputs
        seen[contestant.name] = error, memory
    return seen


def time_all(race: Race, meter: Meter, effort: Effort) -> dict[str, list[float]]:
    """Seconds of every round of every contestant."""
    times: dict[str, list[float]] = {contestant.name: [] for contestant in race.contestants}
    while pending := [c for c in race.contestants if not effort.enough(times[c.name])]:
        for contestant in pending:
            times[contestant.name].append(_timed(contestant, meter))
    return times


def judge(goal: Goal, result: CellResult) -> GoalOutcome:
    """Whether the measured figures meet a goal. Unknown (None) where the figure is missing."""
    value: float | None
    if goal.kind == "speedup":
        against = result.best_peer if goal.against == BEST_PEER else goal.against
        value = result.ratio(against) if against else None
    elif goal.kind == "roofline":
        value = result.roofline_ratio
    else:
        ours, other = result.timings.get(OURS), result.timings.get(goal.against)
        value = ours.memory / max(other.memory, 1) if ours and other and ours.memory and other.memory else None
    if value is None:
        return GoalOutcome(str(goal), None, None, None)
    shortfall = goal.bound / value if goal.kind == "speedup" else value / goal.bound
    return GoalOutcome(str(goal), value, shortfall <= 1, None if shortfall <= 1 else shortfall)


def measure(cell: Cell, effort: Effort, limits: Limits | None = None, meter: Meter | None = None) -> CellResult:
    """Check and time one cell, on this many threads of the CPU unless there is another meter. A failed check is
    reported in place of times.
    """
    result = CellResult(cell.key, cell.section, cell.case, cell.threads, dict(cell.tags))
    if meter is None:
        torch.set_num_threads(cell.threads)
        meter = CpuMeter(cell.threads)
    race = cell.build()
    assert race.contestants[0].name == OURS
    result.facts = dict(race.facts)
    try:
        seen = check_all(race, cell.tolerance, meter)
    except CheckFailed as failure:
        result.failure = str(failure)
        return result
    if limits is not None and race.work is not None:
        result.roofline_seconds = limits.seconds(race.work)
    comparable = {contestant.name: contestant.comparable for contestant in race.contestants}
    for name, times in time_all(race, meter, effort).items():
        error, memory = seen[name]
        low, high = (min(times), max(times)) if len(times) < 4 else statistics.quantiles(times, n=4)[::2]
        result.timings[name] = Timing(statistics.median(times), low, high, len(times), memory, comparable[name], error)
    result.goals = [judge(goal, result) for goal in cell.goals]
    return result
