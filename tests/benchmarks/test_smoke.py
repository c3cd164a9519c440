"""Every cell of every section on tiny shapes: contestants agree with ours, and the report gets written."""

from __future__ import annotations

import json

import pytest

from benchmarks import run
from benchmarks.harness import measure
from benchmarks.results import Results
from benchmarks.run import QUICK, SECTIONS, main, section_cells


@pytest.mark.parametrize("section", SECTIONS)
def test_contestants_agree(section: str) -> None:
    for cell in section_cells(section, quick=True):
        result = measure(cell, QUICK)
        assert result.failure is None, f"{cell.key}: {result.failure}"
        assert len(result.timings) > 1


def test_full_cells_have_unique_keys_and_goals() -> None:
    for section in SECTIONS:
        cells = list(section_cells(section, quick=False))
        assert len({cell.key for cell in cells}) == len(cells)
        assert all(cell.goals for cell in cells)


def test_no_cell_begins_after_the_budget(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "keep_freed_memory", lambda **_: None)  # would last beyond this test
    settings = {"quick": True, "missing": False, "match": "linear gate, fp32 forward,"}
    assert run.run_section("router", tmp_path, **settings, budget=-1)
    assert not Results.load(tmp_path).cells
    assert run.run_section("router", tmp_path, **settings, budget=600)
    assert Results.load(tmp_path).cells


@pytest.mark.slow
def test_quick_run(tmp_path) -> None:
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["broken"] == {}
    table = (tmp_path / "table.md").read_text()
    assert all((tmp_path / f"{section}.png").exists() and f"({section}.png)" in table for section in SECTIONS)


def test_unknown_section(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "attention,nonsense"])
    assert "got nonsense" in capsys.readouterr().err
