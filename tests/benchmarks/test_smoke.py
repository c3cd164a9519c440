"""Every cell of every file on tiny shapes, as users run them: contestants agree with ours, and a report is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import options_of
from benchmarks.report import write_report

ROOT = Path(__file__).parent.parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-c", "benchmarks/pytest.ini"]
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


def quick_pytest(file: Path, *arguments: object, plugins: str = "") -> subprocess.CompletedProcess[str]:
    """One process for all, and no report."""
    options = ["--quick", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2", f"--benchmark-json={file}"]
    return run([*PYTEST, *map(str, arguments), *options, "--benchmark-quiet"], plugins)


def test_contestants_agree(tmp_path: Path) -> None:
    result = quick_pytest(tmp_path / "all.json", "benchmarks")
    assert result.returncode == 0, result.stdout + result.stderr
    write_report(tmp_path, {})
    cells = rows(tmp_path, "all")
    table = (tmp_path / "table.md").read_text()
    assert {cell.partition("::")[0].rpartition("bench_")[2].removesuffix(".py") for cell in cells} == set(FILES)
    for contestants in cells.values():
        assert len(contestants) > 1
        ours = contestants["ours"]
        assert ours["left_out"] == {}
        assert list(ours["seconds"]) == ["cpu", "wall"]
        assert 0 < ours["of_limit"] < 1.5
        assert ours["case"] in table


def test_the_cells_of_a_gpu_on_a_stand_in(tmp_path: Path) -> None:
    result = quick_pytest(tmp_path / "all.json", "benchmarks/ops", "--device=cuda", plugins="-p stand_in_gpu")
    assert result.returncode == 0, result.stdout + result.stderr
    write_report(tmp_path, {})
    cells = rows(tmp_path, "all")
    assert len({contestants["ours"]["section"] for contestants in cells.values()}) == 5
    for contestants in cells.values():
        assert len(contestants) > 1
        assert contestants["ours"]["threads"] == 0 and contestants["ours"]["left_out"] == {}
    table = (tmp_path / "table.md").read_text()
    assert "Stand-in (compute capability 9.0" in table
    assert "| GPU |" in table
    assert "| clocks.sm | 2 MHz | 1 MHz |" in table


def test_selection_budget_and_going_on(tmp_path: Path) -> None:
    def measured() -> set[str]:
        return {info["case"] for cell in rows(tmp_path, "route_topk").values() for info in cell.values()}

    file, options = FILES["route_topk"], ("-k", "linear and fp32 and not backward")
    late = quick_pytest(tmp_path / "route_topk.json", file, *options, "--budget=-1")
    assert late.returncode == 0 and "1 skipped" in late.stdout
    assert not (tmp_path / "route_topk.json").exists()
    assert quick_pytest(tmp_path / "route_topk.json", file, *options).returncode == 0
    assert measured() == {"linear gate, fp32, forward, T32"}
    before = (tmp_path / "route_topk.json").read_text()
    result = bench("--quick", "--out", tmp_path, file, "-k", "linear and fp32", "--missing")
    assert result.returncode == 0 and "1 passed" in result.stdout
    assert measured() == {"linear gate, fp32, forward, T32", "linear gate, fp32, forward+backward, T32"}
    kept = json.loads(before)["benchmarks"]
    assert json.loads((tmp_path / "route_topk.json").read_text())["benchmarks"][: len(kept)] == kept


WRONG = """
import pytest
import torch

from benchmarks.report import write_report
from benchmarks.race import Contestant, Race, Tolerance


@pytest.mark.cases("threads value", cpu=[(1, 1.0), (1, 2.0)], cuda=[])
def test_wrong(run, value):
    def entry(name, number):
        return Contestant(name, lambda: {"y": torch.full((2, 2), number)})

    run(Race([entry("ours", 1.0), entry("reference", value)], Tolerance(1e-3)))
"""


def test_a_wrong_result_is_reported_in_place_of_times(tmp_path: Path) -> None:
    file = tmp_path / "bench_wrong.py"
    file.write_text(WRONG)
    alone = quick_pytest(tmp_path / "alone.json", file, "-k", "2.0", plugins="-p benchmarks.conftest")
    both = bench("--quick", "--out", tmp_path / "both", file, plugins="-p benchmarks.conftest")
    for result, saved, count in (alone, "alone.json", 0), (both, "both/wrong.json", 2):
        assert result.returncode == 1, result.stdout + result.stderr
        data = json.loads((tmp_path / saved).read_text())
        (why,) = data["failures"].values()
        assert why.endswith("CheckFailed: reference: y deviates by 1, allowed 0.001")
        assert len(data["benchmarks"]) == count
    table = (tmp_path / "both" / "table.md").read_text()
    assert "reference: y deviates by 1" in table and "- wrong: a test failed" in table


def test_instruction_sets_one_after_another(tmp_path: Path) -> None:
    options = ("-k", "linear and fp32 and not backward")
    result = bench("--quick", "--out", tmp_path, "--isa", "native,baseline", FILES["route_topk"], *options)
    assert result.returncode == 0, result.stdout + result.stderr
    for name, isa in (("route_topk", "native"), ("route_topk.baseline", "baseline")):
        assert {info["isa"] for cell in rows(tmp_path, name).values() for info in cell.values()} == {isa}
        ran = json.loads((tmp_path / f"{name}.json").read_text())["machine_info"]["cpu_isa"]
        assert isa == "native" or ran == isa
    table = (tmp_path / "table.md").read_text()
    assert "| linear gate, fp32, forward, T32 | 1 (CPU time), baseline |" in table


@pytest.mark.parametrize(("device", "cells"), [("cpu", 302), ("cuda", 164)])
def test_full_cells(device: str, cells: int) -> None:
    """Nothing is there twice (conftest.py refuses it), and a run ends in reasonable time."""
    plugins = "-p stand_in_gpu" if device == "cuda" else ""
    result = run([*PYTEST, "benchmarks", "--collect-only", "-qq", f"--device={device}"], plugins)
    assert result.returncode == 0, result.stdout + result.stderr
    assert cells - 20 < sum("::" in line for line in result.stdout.splitlines()) <= cells


def test_folders_files_and_tests_are_told_from_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ops = "benchmarks/ops/"
    one = f"{ops}bench_grouped_gemm.py::test_grouped_gemm"
    _, files, options = options_of([ops, one, "-k", "fp32"])
    assert files == [*sorted(map(str, Path(ops).glob("bench_*.py"))), one]
    assert options == ["-k", "fp32"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--budget", "-5"], "--budget must be >= 0"),
        (["--budget", "nan"], "--budget must be >= 0"),
        (["benchmarks/ops/bench_nothing.py"], "there is no file benchmarks/ops/bench_nothing.py"),
        (["--out", "README.md"], "--out must be a folder"),
        (["--isa", "native,sse9"], "--isa must be of native, avx512, avx2, baseline, got sse9"),
        (["--device", "cuda", "--isa", "baseline"], "--isa must be native with --device cuda, got baseline"),
    ],
)
def test_wrong_options_are_named(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        options_of(words)
    assert complaint in capsys.readouterr().err


def test_mistakes_in_the_command_are_named(tmp_path: Path) -> None:
    assert "KIND of ggml, kt-kernel, got llama=x" in bench("--peer-python=llama=x", "--out", tmp_path).stderr
    assert "--devise" in (result := bench("--devise", "cpu", "--out", tmp_path)).stderr and result.returncode != 0
    if not torch.cuda.is_available():
        result = bench("--device", "cuda")
        assert result.returncode != 0 and "sees no GPU" in result.stderr
