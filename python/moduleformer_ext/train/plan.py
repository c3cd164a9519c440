"""What is measured once, before the first step, and then stays: the arithmetic and the number of steps."""

import time
from collections.abc import Callable, Mapping
from typing import Literal

from moduleformer_ext.data import TokenStream
from moduleformer_ext.distributed import ALONE, Processes
from moduleformer_ext.records import Count, Record
from moduleformer_ext.train.evaluation import evaluate
from moduleformer_ext.train.trainer import Trainer

_CLOSING_SECONDS = 12.0
"""Set aside for samples, figures and the last checkpoint."""
_SAFETY = 0.9
"""Part of the remaining time that is planned: other programs may slow the machine, and checkpoints take time."""
_FEWEST_STEPS = 20
Dtype = Literal["fp32", "bf16"]
_PATIENCE_SECONDS = 8.0


class Plan(Record):
    """Fixed for the life of a run."""

    steps: Count
    dtype: Dtype
    seconds_per_step: dict[Dtype, float]
    """As measured, by dtype."""


def make_plan(
    make_trainer: Callable[[str], Trainer],
    held_out: Mapping[str, TokenStream],
    *,
    dtype: Dtype | Literal["auto"],
    steps: int,
    deadline: float | None,
    processes: Processes = ALONE,
) -> Plan:
    """Time a few steps of throw-away trainers and choose.

    `dtype` "auto" takes the faster of fp32 and bf16. With `steps` 0, as many are planned as leave time for the
    evaluation before `deadline` (of `time.monotonic`). Several processes decide alike, by the slowest.
    """
    candidates: tuple[Dtype, ...] = ("bf16", "fp32") if dtype == "auto" else (dtype,)
    if steps and len(candidates) == 1:
        return Plan(steps=steps, dtype=candidates[0], seconds_per_step={})
    seconds = {name: _seconds_per_step(make_trainer(name), processes) for name in candidates}
    chosen = min(seconds, key=seconds.__getitem__)
    if not steps:
        assert deadline is not None
        closing = _CLOSING_SECONDS + _evaluation_seconds(make_trainer(chosen), held_out, processes)
        spare = -processes.largest(time.monotonic() + closing - deadline)
        steps = int(_SAFETY * spare / seconds[chosen])
        if steps < _FEWEST_STEPS:
            raise ValueError(
                f"minutes: the budget leaves room for {max(steps, 0)} steps of {seconds[chosen]:.2f} s, "
                f"expected at least {_FEWEST_STEPS}; allow more time or shrink the model"
            )
    return Plan(steps=steps, dtype=chosen, seconds_per_step=seconds)


def _seconds_per_step(trainer: Trainer, processes: Processes) -> float:
    begin = time.monotonic()
    for _ in range(4):  # the history must be there, memory allocated
        trainer.take_step()
    times: list[float] = []
    while len(times) < 4 and (not times or processes.largest(time.monotonic() - begin) < _PATIENCE_SECONDS):
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
