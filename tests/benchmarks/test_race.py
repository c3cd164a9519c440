"""Checked before timed, timed in turns, and reported as measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import machine
from benchmarks.machine import CpuMeter, CudaMeter, Limits, Work, measure_limits, path_part, peak_extra_bytes
from benchmarks.race import (
    BEST_PEER,
    LIMIT,
    MEMORY,
    OURS,
    REFERENCE,
    Backward,
    CheckFailed,
    Contestant,
    Effort,
    Peer,
    Race,
    Tolerance,
    check,
    contestant,
    measure,
    row_error,
)
from benchmarks.report import Cell, Run, goals_table, section_table, write_index, write_report

FAST = Effort(seconds=0.01, min_rounds=2, max_rounds=4)
METER = CpuMeter(2)


def entry(
    name: str, calls: list[str], value: float = 1.0, *, seconds: float = 0.0, comparable: bool = True
) -> Contestant:
    def run() -> dict[str, torch.Tensor]:
        calls.append(name)
        time.sleep(seconds)
        return {"y": torch.full((3, 4), value)}

    return Contestant(name, run, comparable=comparable)


def test_rounds_are_interleaved_after_all_checks() -> None:
    calls: list[str] = []
    entries = [entry(OURS, calls), entry(REFERENCE, calls), entry("yardstick", calls, value=7.0, comparable=False)]
    ran, left_out = measure(Race(entries, Tolerance(1e-3)), METER, FAST)
    names = [OURS, REFERENCE, "yardstick"]
    assert calls == [name for name in names for _ in range(2)] + names * 4
    assert left_out == {}
    assert [measured.comparable for measured in ran.values()] == [True, True, False]
    assert all(len(measured.times) == 4 for measured in ran.values())
    assert (ran[REFERENCE].error, ran["yardstick"].error) == (0.0, None)


def test_a_contestant_of_another_process_tells_its_own_time() -> None:
    elsewhere = replace(entry(REFERENCE, []), clocks=lambda: {"cpu": 3.0, "wall": 4.0})
    ran, _ = measure(Race([entry(OURS, []), elsewhere], Tolerance(1e-3)), METER, FAST)
    assert ran[REFERENCE].rounds[0] == {"wall": 4.0, "cpu": 3.0}
    assert ran[REFERENCE].times[0] == 4.0 and ran[OURS].times[0] < 1
    assert ran[REFERENCE].memory is None


def test_a_wrong_result_gets_no_time() -> None:
    calls: list[str] = []
    entries = [entry(OURS, calls), entry(REFERENCE, calls, value=1.1), entry("never run", calls)]
    with pytest.raises(CheckFailed, match=r"reference: y deviates by 0\.1"):
        measure(Race(entries, Tolerance(1e-3)), METER, FAST)
    assert calls == [OURS, OURS, REFERENCE, REFERENCE]


def test_ours_is_checked_by_an_oracle() -> None:
    race = Race([entry(OURS, [])], Tolerance(1e-3), oracle=lambda outputs: (outputs, {"y": torch.full((3, 4), 1.1)}))
    with pytest.raises(CheckFailed, match="ours: y deviates"):
        measure(race, METER, FAST)


def test_peers_that_fail_are_left_out_and_named() -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise RuntimeError("not on this device\nat all")

    bad = Contestant("bad", fail)
    ran, left_out = measure(Race([entry(OURS, []), bad, entry("good", [])], Tolerance(1e-3)), METER, FAST)
    assert list(ran) == [OURS, "good"]
    assert left_out == {"bad": "RuntimeError: not on this device"}
    with pytest.raises(RuntimeError, match="not on this device"):
        measure(Race([Contestant(OURS, fail), entry("good", [])], Tolerance(1e-3)), METER, FAST)


def test_a_peer_that_fails_in_a_timed_round_or_when_bound_is_left_out() -> None:
    calls: list[int] = []

    def worn_out() -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) > 3:
            raise ValueError("no more")
        return {"y": torch.full((3, 4), 1.0)}

    def bind(shape: tuple[int, int]) -> Callable[[], torch.Tensor]:
        raise RuntimeError("could not create a primitive descriptor")

    late = Contestant("late", worn_out)
    unbound = contestant("unbound", Peer(bind).bound((3, 4)))
    ran, left_out = measure(Race([entry(OURS, []), late, unbound], Tolerance(1e-3)), METER, FAST)
    assert list(ran) == [OURS] and len(ran[OURS].times) == 4
    assert left_out == {
        "late": "ValueError: no more",
        "unbound": "RuntimeError: could not create a primitive descriptor",
    }
    fine = Peer(lambda value: lambda: torch.full((3, 4), value)).bound(1.0)
    assert torch.equal(fine(), fine())


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
    x = torch.ones(2, 3)
    ours = contestant(OURS, lambda: 2 * x, Backward({"x": x}, torch.ones(2, 3), into_grad))
    for _ in range(2):
        ours.prepare()
        before = x.grad
        assert torch.equal(ours.run()["dx"], torch.full((2, 3), 2.0))
        assert (x.grad is before) == into_grad


def test_effort() -> None:
    effort = Effort(seconds=1.0, min_rounds=3, max_rounds=5)
    assert not effort.enough([])
    assert not effort.enough([0.6, 0.6])
    assert effort.enough([0.6, 0.6, 0.6])
    assert effort.enough([1.5, 1.5])  # slow: two rounds do
    assert effort.enough([0.01] * 5)


def test_one_thread_is_measured_by_the_time_that_it_has_the_processor() -> None:
    clocks = CpuMeter(1).seconds(lambda: time.sleep(0.05))
    assert list(clocks) == ["cpu", "wall"] and clocks["cpu"] < 0.04 < clocks["wall"]
    assert list(CpuMeter(2).seconds(lambda: None)) == ["wall", "cpu"]


def test_peak_memory() -> None:
    peak = peak_extra_bytes(lambda: torch.ones(1 << 23).sum())
    if peak is None:
        pytest.skip("this system does not tell")
    assert 32e6 < peak < 48e6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_by_its_own_clock() -> None:
    meter, x = CudaMeter(), torch.randn(1 << 26, device="cuda")
    least = x.nbytes / 10e12  # no memory is that fast
    assert least < meter.seconds(lambda: x + 1)["device"] < 1
    assert meter.peak_bytes(lambda: x + 1) == x.nbytes
    assert machine.describe("cuda")["gpu"]


def test_names_become_parts_of_paths() -> None:
    assert path_part("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


LIMITS = Limits({"fp32": 1e9, "bf16": None}, {"fp32": "mm"}, 1e9)


def test_the_limit_is_the_slower_of_arithmetic_and_reads() -> None:
    assert LIMITS.seconds(Work(torch.float32, flops=2e6, bytes_read=1e6)) == pytest.approx(2e-3)
    assert LIMITS.seconds(Work(torch.float32, flops=2e6, bytes_read=3e6)) == pytest.approx(3e-3)
    assert LIMITS.seconds(Work(torch.bfloat16, bytes_read=3e6)) == pytest.approx(3e-3)
    assert LIMITS.seconds(Work(torch.bfloat16, flops=2e6, bytes_read=3e6)) is None


class QuickMeter:
    def seconds(self, run: Callable[[], object]) -> dict[str, float]:
        run()
        return {"wall": 0.5}

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        return None


def test_a_type_without_any_product_has_no_limit(monkeypatch, capsys) -> None:
    def products(dtype: torch.dtype, n: int) -> dict[str, Callable[[], object]]:
        def missing() -> None:
            raise RuntimeError("could not create a primitive descriptor\nfor a matmul")

        return {"mm": missing, "other": missing} if dtype == torch.bfloat16 else {"mm": lambda: None, "other": missing}

    monkeypatch.setattr(machine, "_products", products)
    limits = measure_limits(QuickMeter(), budget=0.1, n=10)
    assert limits.matrix_flops == {"fp32": 2 * 10**3 / 0.5, "bf16": None}
    assert limits.matrix_by == {"fp32": "mm"}
    why = "could not create a primitive descriptor"
    assert limits.left_out == {"fp32, other": why, "bf16, mm": why, "bf16, other": why}
    message = "limit of bf16 products: measured without mm: could not create a primitive descriptor\n"
    assert message in capsys.readouterr().err


PEAK = """
from benchmarks.machine import CpuMeter, measure_limits
limits = measure_limits(CpuMeter(1), budget=0.01, n=128)
print(limits.matrix_flops["bf16"], limits.matrix_by["bf16"], sep=";")
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


def row(name: str, median: float, memory: int | None = None, **info: object) -> dict[str, object]:
    """As pytest-benchmark writes it and conftest.py fills it."""
    extra = {
        "cell": "bench_x.py::test_x[1thread-fp32]",
        "section": "A section",
        "case": "fp32",
        "threads": 1,
        "contestant": name,
        "comparable": name != "yardstick",
        "memory": memory,
        "limit": 2e-3,
        "of_limit": 2e-3 / median,
        "flops": 8e9,
        **info,
    }
    return {"stats": {"median": median}, "extra_info": extra}


GOALS = {REFERENCE: 2.0, "yardstick": 50.0, LIMIT: 1000.0, BEST_PEER: 1.5, "absent": 1.0, MEMORY + REFERENCE: 1.0}
OF_OURS = {"facts": {"live tiles": 0.5}, "goals": GOALS, "left_out": {"kernel": "RuntimeError: no"}}
ROWS = [
    row(OURS, 0.004, 3 << 20, **OF_OURS),
    row(REFERENCE, 0.02, 2 << 20),
    row("yardstick", 0.001),
]


def test_arithmetic_of_the_report() -> None:
    cell = Cell({str(r["extra_info"]["contestant"]): r for r in ROWS})
    assert cell.best_peer == REFERENCE  # the yardstick is faster, but no peer
    assert cell.ratio(REFERENCE) == pytest.approx(5)
    assert cell.over_limit == pytest.approx(2)
    verdicts = {name: cell.judge(name, bound) for name, bound in GOALS.items()}
    assert {name: str(verdict) for name, verdict in verdicts.items()} == {
        REFERENCE: "met",
        "yardstick": "missed by 200.00x",
        LIMIT: "met",
        BEST_PEER: "met",
        "absent": "not measured",
        MEMORY + REFERENCE: "missed by 1.50x",
    }
    unknown = Cell({OURS: row(OURS, 0.004, of_limit=None)})
    assert str(unknown.judge(LIMIT, 1.0)) == str(unknown.judge(BEST_PEER, 1.0)) == "not measured"


def test_instruction_sets_are_told_apart(tmp_path: Path) -> None:
    slower = [row(OURS, 0.01, isa="avx2", **OF_OURS), row(REFERENCE, 0.005, isa="avx2")]
    common = {"machine_info": {}, "failures": {"test_y": "no"}}
    out = {"fp32, oneDNN's linear": "could not create a primitive descriptor"}
    (tmp_path / "x.json").write_text(json.dumps({**common, "benchmarks": ROWS, "limits": {"1": vars(LIMITS)}}))
    limits = {"1": {**vars(LIMITS), "read_bytes": 5e9, "left_out": out}}
    (tmp_path / "x.avx2.json").write_text(json.dumps({**common, "benchmarks": slower, "limits": limits, "isa": "avx2"}))
    write_report(tmp_path, {})
    table = (tmp_path / "table.md").read_text()
    for text in (
        "| fp32 | 1 (CPU time) | 4 | 20 | 1 |",
        "| fp32 | 1 (CPU time), avx2 | 10 | 5 | - |",
        "| 1, avx2 | 1 | not available | 5 |",
        "No peer is faster: met in 1 of 2 cells.",
        "- test_y (avx2): no",
        "- limit of fp32, oneDNN's linear (avx2): could not create a primitive descriptor",
    ):
        assert text in table, text


def test_a_folder_is_reported(tmp_path: Path) -> None:
    run = tmp_path / "2030-01-01-machine"
    run.mkdir()
    file = {
        "machine_info": {"cpu": "a processor", "packages": {"scattermoe": "1.0"}},
        "benchmarks": ROWS,
        "failures": {"bench_x.py::test_x[wrong]": "CheckFailed: reference: y deviates"},
        "limits": {"1": vars(LIMITS), "2": {**vars(LIMITS), "matrix_flops": {"fp32": 2e9, "bf16": 3e9}}},
    }
    (run / "one.json").write_text(json.dumps(file))
    faster = {**file, "benchmarks": [], "limits": {"1": {**vars(LIMITS), "read_bytes": 5e9}}}
    (run / "two.json").write_text(json.dumps(faster))
    write_report(run, {"layer": "ended with status -9"})
    assert (run / "a-section.png").stat().st_size > 1000
    table = (run / "table.md").read_text()
    for text in (
        "a processor",
        "scattermoe 1.0",
        "| 1 | 1 | not available | 5 |",
        "| 2 | 2 | 3 | 1 |",
        "| ≥ 2x reference | 5.00x | met |",
        "No peer is faster: met in 1 of 1 cells.",
        "No more memory than reference: met in 0 of 1 cells.",
        "test_x[wrong]: CheckFailed: reference: y deviates",
        "- layer: ended with status -9",
        "- kernel, A section, fp32: RuntimeError: no",
        "(a-section.png)",
    ):
        assert text in table, text
    write_index(tmp_path, run)
    assert "2030-01-01-machine/table.md" in (tmp_path / "README.md").read_text()
    loaded = Run.load(run)
    for line in (section_table(loaded.cells) + "\n" + goals_table(loaded)).splitlines():
        assert line.count("|") in (0, 7, 13), line
