"""The benchmarks as a verb: tables, records, and what can be wrong."""

import json
from pathlib import Path

import pytest

from moduleformer_ext.cli import main

QUICK = ["bench", "linear_decode", "--quick", "--select", "fp32 and T1 and projection"]


@pytest.fixture(autouse=True)
def _installed() -> None:
    pytest.importorskip("pytest_benchmark")


def test_a_table_and_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--output", str(tmp_path / "out")]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[1] == "Dense projection of a few tokens"
    assert lines[2].split()[:3] == ["case", "threads", "ours,"]
    assert lines[3].startswith("fp32, T1, projection")
    assert lines[-1] == f"wrote {tmp_path / 'out' / 'table.md'}"
    assert (tmp_path / "out" / "table.md").is_file()
    assert (tmp_path / "out" / "linear_decode.json").is_file()


def test_json_is_all_of_standard_output(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*QUICK, "--json"]) == 0
    captured = capfd.readouterr()
    (cell,) = json.loads(captured.out)
    assert (cell["case"], cell["threads"]) == ("fp32, T1, projection", 1)
    assert set(cell["seconds"]) == set(cell["comparable"]) == {"ours", "reference"}
    assert all(seconds > 0 for seconds in cell["seconds"].values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "sdpa"], "NAMES must be among expert_ffn, "),
        (["bench", "linear_decode", "--quick", "--select", "nothing_like_it"], "nothing was measured"),
        (["bench", "linear_decode", "--quick", "--select", "and and"], "pytest says above which option is wrong"),
        (["bench", "--budget", "-1"], "--budget must be at least 0, got -1"),
        (["bench", "--device", "tpu"], "--device must be 'cpu' or 'cuda', got tpu"),
    ],
)
def test_complaints(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capfd.readouterr().err.splitlines()[-1]


def test_missing_packages_are_named(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench"]) == 2
    assert "bench needs pytest and pytest-benchmark; install with: pip install 'moduleformer_ext[bench]'" in (
        capfd.readouterr().err
    )
