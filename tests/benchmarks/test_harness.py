from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.cells import (
    NOT_SLOWER,
    OURS,
    REFERENCE,
    Cell,
    Contestant,
    Goal,
    Race,
    Tolerance,
    Work,
    forward_backward,
)
from benchmarks.harness import CellResult, CheckFailed, Effort, check, judge, measure, row_error
from benchmarks.machine import Limits, peak_extra_bytes
from benchmarks.plots import draw
from benchmarks.report import goals_table, section_table, write_index, write_table
from benchmarks.results import Results

FAST = Effort(seconds=0.01, min_rounds=2, max_rounds=4, slow_rounds=1)
LIMITS = Limits(2, {"fp32": 1e9, "bf16": 2e9}, 1e9)


def sleeper(name: str, seconds: float, value: float = 1.0, *, comparable: bool = True) -> Contestant:
    def run() -> dict[str, torch.Tensor]:
        time.sleep(seconds)
        return {"y": torch.full((3, 4), value)}

    return Contestant(name, run, comparable=comparable)


def cell(*contestants: Contestant, goals: tuple[Goal, ...] = ()) -> Cell:
    race = Race(contestants, Work(torch.float32, flops=2e6), {"live tiles": 0.5})
    tags = {"dtype": "fp32", "tokens": 8, "direction": "forward", "kind": ""}
    return Cell("attention", "a case", 2, lambda: race, Tolerance(1e-3), goals, tags)


def test_ratios_goals_and_roofline() -> None:
    goals = (
        Goal("speedup", 2.0, REFERENCE),
        Goal("speedup", 50.0, "yardstick"),
        NOT_SLOWER,
        Goal("roofline", 1000.0),
        Goal("speedup", 1.0, "absent"),
    )
    fast, slow, yardstick = (
        sleeper(OURS, 0.004),
        sleeper(REFERENCE, 0.02),
        sleeper("yardstick", 0.001, value=7.0, comparable=False),
    )
    result = measure(cell(fast, slow, yardstick, goals=goals), FAST, LIMITS)
    assert result.failure is None
    assert result.best_peer == REFERENCE  # the yardstick is faster, but no peer
    assert 2 < result.ratio(REFERENCE) < 10
    assert result.roofline_seconds == pytest.approx(2e-3)
    assert [outcome.met for outcome in result.goals] == [True, False, True, True, None]
    assert result.goals[1].missed_by == pytest.approx(50 / result.ratio("yardstick"))
    assert result.timings[OURS].rounds >= 2


def test_a_wrong_result_gets_no_time() -> None:
    result = measure(cell(sleeper(OURS, 0), sleeper(REFERENCE, 0, value=1.1)), FAST)
    assert not result.timings
    assert "reference: y deviates by 0.1" in result.failure


def test_check() -> None:
    y = torch.randn(100, 8)
    off = y.clone()
    off[:3] += 1
    assert row_error(off, y, quantile=0.95) == 0
    assert row_error(off, y, quantile=1.0) > 0.1
    assert check("peer", {"y": off}, {"y": y, "dx": y}, Tolerance(1e-6, quantile=0.9)) == 0
    with pytest.raises(CheckFailed, match="peer: y deviates"):
        check("peer", {"y": off}, {"y": y}, Tolerance(1e-2))
    with pytest.raises(CheckFailed, match="deviates"):
        check("peer", {"y": y * torch.nan}, {"y": y}, Tolerance(1e-2))
    with pytest.raises(CheckFailed, match="shape"):
        check("peer", {"y": y[1:]}, {"y": y}, Tolerance(1e-2))
    with pytest.raises(CheckFailed, match="no output in common"):
        check("peer", {"z": y}, {"y": y}, Tolerance(1e-2))


@pytest.mark.parametrize("into_grad", [False, True])
def test_every_round_starts_from_the_same_gradients(into_grad: bool) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    contestant = forward_backward(OURS, lambda: 2 * x, {"x": x}, torch.ones(2, 3), into_grad=into_grad)
    for _ in range(2):
        contestant.prepare()
        before = x.grad
        assert torch.equal(contestant.run()["dx"], torch.full((2, 3), 2.0))
        assert (x.grad is before) == into_grad


def test_peak_memory() -> None:
    peak = peak_extra_bytes(lambda: torch.ones(1 << 23).sum())
    if peak is None:
        pytest.skip("this system does not tell")
    assert 32e6 < peak < 48e6


def test_effort() -> None:
    effort = Effort(seconds=1.0, min_rounds=3, max_rounds=5, slow_rounds=2)
    assert not effort.enough([])
    assert not effort.enough([0.6, 0.6])
    assert effort.enough([0.6, 0.6, 0.6])
    assert effort.enough([1.5, 1.5])  # slow: two rounds do
    assert effort.enough([0.01] * 5)


def test_results_survive_and_are_reported(tmp_path) -> None:
    goals = (Goal("speedup", 1.5, REFERENCE), NOT_SLOWER, Goal("memory", 1.0, REFERENCE))
    good = measure(cell(sleeper(OURS, 0.001), sleeper(REFERENCE, 0.004), goals=goals), FAST, LIMITS)
    results = Results(machine={"cpu": "a processor"}, limits={2: LIMITS}, broken={"block": "ended with status -9"})
    results.cells[good.key] = good
    bad = CellResult("k", "attention", "a wrong case", 2, {}, failure="reference: y deviates")
    results.cells[bad.key] = bad
    run = tmp_path / "2030-01-01-machine"
    results.save(run)
    loaded = Results.load(run)
    assert loaded.cells == results.cells
    assert loaded.limits == results.limits

    draw(loaded, run)
    assert (run / "attention.png").stat().st_size > 1000
    write_table(loaded, run)
    table = (run / "table.md").read_text()
    for text in ("a processor", "≥ 1.5x reference", "met", "no time: reference: y deviates", "ended with status -9"):
        assert text in table
    assert "attention.png" in table
    write_index(tmp_path, run)
    assert "2030-01-01-machine/table.md" in (tmp_path / "README.md").read_text()
    for line in (section_table(loaded.section("attention")) + "\n" + goals_table(loaded)).splitlines():
        assert line.count("|") in (0, 7, 11), line
    assert Results.load(tmp_path / "nothing").cells == {}


def test_unknown_goal_is_not_measured() -> None:
    outcome = judge(Goal("speedup", 2.0, REFERENCE), CellResult("k", "attention", "case", 1, {}))
    assert (outcome.value, outcome.met) == (None, None)


PEAK = """
import torch
from benchmarks.machine import _matrix_peak
print(*_matrix_peak(torch.bfloat16, 0.01, 128), sep=";")
"""


@pytest.mark.parametrize("isa", ["AVX2", "DEFAULT"])
def test_the_limit_is_measured_where_onednn_has_no_16_bit_product(isa: str) -> None:
    """As on processors without AVX-512; what is missing is said."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rate, product = result.stdout.strip().split(";")
    assert float(rate) > 0
    assert product in ("mm", "oneDNN's linear", "mm in float32")
    if isa == "AVX2":
        assert product != "oneDNN's linear"
        assert "limit of bf16 products: measured without oneDNN's linear" in result.stderr
