"""The same cells under pytest-benchmark: ``python -m pytest -c benchmarks/pytest.ini benchmarks/gpu``."""

from __future__ import annotations

import pytest
import torch

from ..cells import Cell
from .__main__ import EFFORT, measure_usable
from .cells import SECTIONS
from .device import clocks, describe
from .meter import CudaMeter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "cell", [cell for cells in SECTIONS.values() for cell in cells(False)], ids=lambda cell: cell.key
)
def test_op(cell: Cell, benchmark: pytest.FixtureRequest) -> None:
    """Ours by pytest-benchmark, launch to completion; the events' medians and ratios in ``extra_info``."""
    with torch.device("cuda"):
        result, failures = measure_usable(cell, EFFORT, CudaMeter())
        assert result.failure is None, result.failure
        benchmark.extra_info |= {
            "device": describe(),
            "clocks": clocks(),
            "median_seconds": {name: timing.median for name, timing in result.timings.items()},
            "ratios": {name: result.ratio(name) for name in result.timings},
            "left_out": failures,
        }
        benchmark.group = cell.section
        ours = cell.build().contestants[0]

        def run() -> None:
            ours.run()
            torch.cuda.synchronize()

        benchmark.pedantic(run, setup=ours.prepare, rounds=EFFORT.min_rounds, warmup_rounds=1)
