"""What is measured once, before the first step, and then stays: the arithmetic and the number of steps."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

from moduleformer_ext.data import TokenStream
from moduleformer_ext.distributed import ALONE, Processes
from moduleformer_ext.records import Count, Record
from moduleformer_ext.train.evaluation import evaluate
from moduleformer_ext.train.trainer import Trainer

CLOSING_SECONDS = 12.0
"""Set aside for samples, figures and the last checkpoint."""
SAFETY = 0.9
"""Part of the remaining time that is planned: other programs may slow the machine, and checkpoints take time."""
_FEWEST_STEPS = 20
Dtype = Literal["fp32", "bf16"]
_PATIENCE_SECONDS = 8.0
_WARM_STEPS, _TIMED_STEPS = 4, 4
_HOPELESS = 2.0
"""What takes so many times longer than another way is not measured to the end."""


class Plan(Record):
    """Fixed for the life of a run."""

    steps: Count
    dtype: Dtype
    seconds_per_step: dict[Dtype, float]
    """As measured, by dtype."""
    threads: Count | None = None
    """Of torch, as measured to be fastest; None where nothing was measured: as many as the process has."""


class Speed(NamedTuple):
    """What was measured of a trainer."""

    seconds_per_step: dict[Dtype, float]
    """By dtype, with the number of threads below."""
    threads: int

    @property
    def best(self) -> float:
        """In the faster dtype."""
        return min(self.seconds_per_step.values())


def make_plan(
    make_trainer: Callable[[str], Trainer],
    held_out: Mapping[str, TokenStream],
    *,
    dtype: Dtype | Literal["auto"],
    steps: int,
    deadline: float | None,
    speed: Speed | None = None,
    processes: Processes = ALONE,
) -> Plan:
    """Time a few steps of throw-away trainers and choose, unless their `speed` was measured before.

    `dtype` "auto" takes the faster of fp32 and bf16. With `steps` 0, as many are planned as leave time for the
    evaluation before `deadline` (of `time.monotonic`). Several processes decide alike, by the slowest.
    """
    if steps and dtype != "auto":
        return Plan(steps=steps, dtype=dtype, seconds_per_step={})
    seconds, threads = measure_speed(make_trainer, dtype, processes=processes) if speed is None else speed
    chosen = fastest(seconds)
    if not steps:
        assert deadline is not None
        with keep_threads(threads):
            closing = CLOSING_SECONDS + _evaluation_seconds(make_trainer(chosen), held_out, processes)
        spare = -processes.largest(time.monotonic() + closing - deadline)
        steps = int(SAFETY * spare / seconds[chosen])
        if steps < _FEWEST_STEPS:
            raise ValueError(
                f"minutes: the budget leaves room for {max(steps, 0)} steps of {seconds[chosen]:.2f} s, "
                f"expected at least {_FEWEST_STEPS}; allow more time or shrink the model"
            )
    return Plan(steps=steps, dtype=chosen, seconds_per_step=seconds, threads=threads)


def fastest(seconds: Mapping[Dtype, float]) -> Dtype:
    """The dtype whose steps take least."""
    return min(seconds, key=seconds.__getitem__)


def measure_speed(
    make_trainer: Callable[[str], Trainer],
    dtype: Dtype | Literal["auto"],
    *,
    threads: int | None = None,
    processes: Processes = ALONE,
) -> Speed:
    """Time a few steps in `dtype`, or in each of fp32 and bf16, with `threads`, or with as many as are fastest.

    Half as many threads, and half of that again, are tried as long as they are faster. On a busy machine they are, by
    far: a step waits for the slowest thread again and again. Of several processes the slowest one counts.
    """
    first: Dtype = "fp32" if dtype == "auto" else dtype
    chosen = int(-processes.largest(-torch.get_num_threads())) if threads is None else threads
    best = _seconds_per_step(make_trainer(first), chosen, processes)
    while threads is None and chosen > 1:
        seconds = _seconds_per_step(make_trainer(first), chosen // 2, processes, hopeless=_HOPELESS * best)
        if seconds >= best:
            break
        best, chosen = seconds, chosen // 2
    measured: dict[Dtype, float] = {first: best}
    if dtype == "auto":
        measured["bf16"] = _seconds_per_step(make_trainer("bf16"), chosen, processes, hopeless=_HOPELESS * best)
    return Speed(measured, chosen)


@contextmanager
def keep_threads(count: int | None = None) -> Iterator[None]:
    """Whatever is set within, torch has as many threads afterwards as before; within, `count` of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds_per_step(
    trainer: Trainer, threads: int, processes: Processes = ALONE, *, hopeless: float = math.inf
) -> float:
    with keep_threads(threads):
        return _timed_steps(trainer, processes, hopeless)


def _timed_steps(trainer: Trainer, processes: Processes, hopeless: float) -> float:
    begin = time.monotonic()
    for _ in range(_WARM_STEPS):  # the history must be there, memory allocated
        start = time.monotonic()
        trainer.take_step()
        if (first := processes.largest(time.monotonic() - start)) > hopeless:
            return first
        if processes.largest(time.monotonic() - begin) > _PATIENCE_SECONDS / 2:
            break
    times: list[float] = []
    while len(times) < _TIMED_STEPS and (not times or processes.largest(time.monotonic() - begin) < _PATIENCE_SECONDS):
        start = time.monotonic()
        trainer.take_step()
        times.append(processes.largest(time.monotonic() - start))
    return sorted(times)[len(times) // 2]


def _evaluation_seconds(trainer: Trainer, held_out: Mapping[str, TokenStream], processes: Processes) -> float:
    config = trainer.config
    tokens = next(iter(held_out.values())).tokens[: 2 * config.batch_size * config.segment_length + 1]
    sample = TokenStream(tokens, num_bytes=len(tokens), num_documents=1)
    start = time.monotonic()
    evaluate(
        trainer.model,
        {"sample": sample},
        batch_size=config.batch_size,
        segment_length=config.segment_length,
        dtype=trainer.dtype,
        processes=processes,
    )
    seconds_per_token = processes.largest(time.monotonic() - start) / sample.num_scored
    return 1.2 * seconds_per_token * sum(stream.num_scored for stream in held_out.values())
