"""The measurements of several processes run, and say what they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.distributed.__main__ import main
from benchmarks.peers import jetmoe


def test_a_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--processes", "1", "2", "--rounds", "2", "--results", str(tmp_path / "report")])
    report = (tmp_path / "report" / "table.md").read_text()
    assert "## What a process sends in a step" in report and "| strong, 2 processes |" in report
    assert "| strong, 2 processes |" in capsys.readouterr().out
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    kinds = ["1 process", "2 processes", "2 processes, experts spread"]
    assert list(found["scaling"]) == [f"{scaling}, {kind}" for scaling in ("weak", "strong") for kind in kinds]
    assert all(row["step_seconds"] > 0 and row["cpu_seconds"] > 0 for row in found["scaling"].values())
    alone, two = (found["scaling"][f"weak, {kind}"]["tokens"] for kind in kinds[:2])
    assert two == 2 * alone
    assert list(found["sent"]) == kinds[1:]
    for name, sent in found["sent"].items():
        assert (sent["exchange"] > 0) == name.endswith("spread")
        parts = sent["gather"] + sent["scatter"] + sent["exchange"]
        assert parts == pytest.approx(sent["fewest"], rel=0.1)
    if jetmoe.AVAILABLE:
        assert list(found["wrapped"]) == ["MoLM", "JetMoE"]


def test_too_few_processes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--processes", "1"])
    assert "--processes must hold 1 and 2, which others are compared with, got [1]" in capsys.readouterr().err
