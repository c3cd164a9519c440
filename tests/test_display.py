"""Tables and progress on terminals of several widths and without one."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moduleformer_ext import display
from moduleformer_ext.display import progress, table

ROWS = [("日本 prose", 1.25, "3.5 %"), ("code", 10.5, None)]
SHOW = """
import sys
from moduleformer_ext.display import progress, table
print(table(["domain", "bits per byte", "share"], [("日本 prose", "1.25", "3.5"), ("code", "10.50", None)]))
with progress("training", 4) as bar:
    for step in range(4):
        bar.advance(1, f"loss {step}")
"""


def _on_terminal(columns: int, script: str = SHOW) -> str:
    """What a terminal of so many columns shows."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "24", "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=slave, stderr=slave, stdin=slave, env=environment)
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(master)
    assert process.wait() == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(chunks).decode())


def _cells(line: str) -> int:
    from rich.cells import cell_len

    return cell_len(line.split("\r")[-1])


def test_a_table_without_a_terminal_is_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    long = "x" * 300
    lines = table(["domain", "bits", "share"], [*ROWS, (long, 7, 0)]).splitlines()
    assert [line.split() for line in lines] == [
        ["domain", "bits", "share"],
        ["日本", "prose", "1.25", "3.5", "%"],
        ["code", "10.5"],
        [long, "7", "0"],
    ]
    assert lines[1].index("1.25") + 4 + 2 == lines[2].index("10.5") + 4  # two characters of two columns each
    assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize("columns", [20, 30, 100])
def test_nothing_is_cut_off_on_a_terminal(columns: int) -> None:
    shown = _on_terminal(columns)
    assert all(_cells(line) <= columns for line in shown.splitlines())
    for word in ("domain", "日本", "prose", "bits per", "1.25", "10.50", "3.5", "100%"):
        assert word in shown
    assert ("loss 3" in shown) == (columns == 100)


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "_LOG_SECONDS", 0.0)
    with progress("training", 10, 4) as bar:
        bar.advance(1, "loss 3.0")
        bar.advance(5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["training: 5 of 10, loss 3.0", "training: 10 of 10"]


@pytest.mark.parametrize("keep", [True, False])
def test_a_bar_stays_only_if_it_is_to_be_kept(keep: bool) -> None:
    script = f"""
from moduleformer_ext.display import progress
with progress("training", 4, keep={keep}) as bar:
    bar.advance(4)
print("end")
"""
    shown = _on_terminal(100, script)
    assert "training" in shown
    assert ("\n\rend" not in shown) == keep  # the cursor went back to the bar's line


def test_markup_in_names_is_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert table(["[red]a[/red]"], [("[b]:smile:",)]).split() == ["[red]a[/red]", "[b]:smile:"]
