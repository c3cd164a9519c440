"""Every cell of every file on tiny shapes, as users run them: contestants agree with ours, and a report is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
FILES = {path.stem.removeprefix("bench_"): path for path in sorted((ROOT / "benchmarks").rglob("bench_*.py"))}


def run(command: list[str], plugins: str = "") -> subprocess.CompletedProcess[str]:
    """Outside of the pytest that runs this test."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": plugins}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "python"), str(ROOT), str(Path(__file__).parent)])
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def bench(*arguments: object, plugins: str = "") -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "benchmarks", *map(str, arguments)], plugins)


def rows(folder: Path, name: str) -> dict[str, dict[str, dict]]:
    """What is said about each contestant of each cell."""
    data = json.loads((folder / f"{name}.json").read_text())
    assert data["failures"] == {} and data["quick"]
    cells: dict[str, dict[str, dict]] = {}
    for row in data["benchmarks"]:
        info = row["extra_info"]
        assert row["stats"]["rounds"] >= 2
        assert row["stats"]["median"] == pytest.approx(next(iter(info["seconds"].values())))
        cells.setdefault(info["cell"], {})[info["contestant"]] = info
    return cells


@pytest.mark.parametrize("name", FILES)
def test_contestants_agree(name: str, tmp_path: Path) -> None:
    result = bench("--quick", "--out", tmp_path, FILES[name])
    assert result.returncode == 0, result.stdout + result.stderr
    table = (tmp_path / "table.md").read_text()
    for contestants in rows(tmp_path, name).values():
        assert len(contestants) > 1
        ours = contestants["ours"]
        assert ours["left_out"] == {}
        assert list(ours["seconds"]) == ["cpu", "wall"]
        assert 0 < ours["of_limit"] < 1.5
        assert ours["case"] in table
        assert f"::test_{name}" in ours["cell"] or name == "layer"


@pytest.mark.parametrize("name", ["stick_attention", "stick_attention_decode", "expert_ffn", "route_topk"])
def test_the_cells_of_a_gpu_on_a_stand_in(name: str, tmp_path: Path) -> None:
    result = bench("--quick", "--device", "cuda", "--out", tmp_path, FILES[name], plugins="-p stand_in_gpu")
    assert result.returncode == 0, result.stdout + result.stderr
    for contestants in rows(tmp_path, name).values():
        assert len(contestants) > 1
        assert contestants["ours"]["threads"] == 0 and contestants["ours"]["left_out"] == {}
    table = (tmp_path / "table.md").read_text()
    assert "Stand-in (compute capability 9.0" in table
    assert "| GPU |" in table
    assert "| clocks.sm | 2 MHz | 1 MHz |" in table


def test_selection_budget_and_going_on(tmp_path: Path) -> None:
    def measured() -> set[str]:
        return {info["case"] for cell in rows(tmp_path, "route_topk").values() for info in cell.values()}

    quick = ("--quick", "--out", tmp_path, FILES["route_topk"])
    assert bench(*quick, "--budget", 0.001).returncode == 0
    assert not (tmp_path / "route_topk.json").exists()
    assert bench(*quick, "-k", "linear and fp32 and not backward").returncode == 0
    assert measured() == {"linear gate, fp32, forward, T32"}
    before = (tmp_path / "route_topk.json").read_text()
    result = bench(*quick, "-k", "linear and fp32", "--missing")
    assert "1 passed" in result.stdout
    assert measured() == {"linear gate, fp32, forward, T32", "linear gate, fp32, forward+backward, T32"}
    kept = json.loads(before)["benchmarks"]
    assert json.loads((tmp_path / "route_topk.json").read_text())["benchmarks"][: len(kept)] == kept


WRONG = """
import pytest
import torch
from benchmarks.race import Contestant, Race, Tolerance


@pytest.mark.cases("threads value", cpu=[(1, 1.0), (1, 2.0)], cuda=[])
def test_wrong(run, value):
    def entry(name, number):
        return Contestant(name, lambda: {"y": torch.full((2, 2), number)})

    run(Race([entry("ours", 1.0), entry("reference", value)], Tolerance(1e-3)))
"""


@pytest.mark.parametrize("selected", ["2.0", "test_wrong"])
def test_a_wrong_result_is_reported_in_place_of_times(selected: str, tmp_path: Path) -> None:
    file = tmp_path / "bench_wrong.py"
    file.write_text(WRONG)
    result = bench("--quick", "--out", tmp_path, file, "-k", selected, plugins="-p benchmarks.conftest")
    assert result.returncode == 1, result.stdout + result.stderr
    data = json.loads((tmp_path / "wrong.json").read_text())
    (why,) = data["failures"].values()
    assert why.endswith("CheckFailed: reference: y deviates by 1, allowed 0.001")
    assert len(data["benchmarks"]) == (0 if selected == "2.0" else 2)
    table = (tmp_path / "table.md").read_text()
    assert "reference: y deviates by 1" in table and "- wrong: a test failed" in table


@pytest.mark.parametrize(("device", "cells"), [("cpu", 200), ("cuda", 140)])
def test_full_cells(device: str, cells: int) -> None:
    """Nothing is there twice (conftest.py refuses it), and a run ends in reasonable time."""
    plugins = "-p stand_in_gpu" if device == "cuda" else ""
    collect = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "benchmarks/pytest.ini",
        "benchmarks",
        "--collect-only",
        "-qq",
    ]  # quiet, but for names
    result = run([*collect, f"--device={device}"], plugins)
    assert result.returncode == 0, result.stdout + result.stderr
    assert cells - 20 < sum("::" in line for line in result.stdout.splitlines()) <= cells


def test_mistakes_in_the_command_are_named(tmp_path: Path) -> None:
    assert "--devise" in (result := bench("--devise", "cpu", "--out", tmp_path)).stderr and result.returncode != 0
    if not torch.cuda.is_available():
        for where in ((), ("--out", tmp_path)):
            result = bench("--device", "cuda", *where)
            assert result.returncode != 0 and "sees no GPU" in result.stderr
