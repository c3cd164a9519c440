"""A cell as a pytest-benchmark test."""

from __future__ import annotations

from typing import Any

import torch

from .cells import Cell
from .harness import Effort, measure

EFFORT = Effort()


def run_cell(cell: Cell, benchmark: Any) -> None:
    """Time ours with pytest-benchmark, after an interleaved comparison whose ratios go to ``extra_info``.

    Fails if a contestant disagrees with ours. Contestants are compared by :func:`benchmarks.harness.measure`, not by
    separate tests: the machine's noise would not hit them alike.
    """
    result = measure(cell, EFFORT)
    assert result.failure is None, result.failure
    benchmark.extra_info["ratios"] = {name: result.ratio(name) for name in result.timings}
    benchmark.extra_info["facts"] = result.facts
    benchmark.group = cell.section
    torch.set_num_threads(cell.threads)
    ours = cell.build().contestants[0]
    benchmark.pedantic(ours.run, setup=ours.prepare, rounds=EFFORT.min_rounds, warmup_rounds=1)
