"""Measure everything and report: `python -m benchmarks [--quick] [--missing] [--isa LIST] [pytest's options]`.

Each `bench_*.py` runs in a process of its own: neither memory nor a crash reaches the next one. Files and `-k` select,
as in pytest; `pytest -c benchmarks/pytest.ini benchmarks --collect-only -q` lists the cells. Results go to
`benchmarks/results/<date>-<machine>/`: a file of pytest-benchmark for each, rewritten after every cell, `table.md` and
pictures. A run into a folder that has results replaces only the cells that it measures; `--missing` measures only those
not there. With `--isa native,avx2` each file runs again in a process that our kernels, oneDNN, ATen and MKL restrict to
that instruction set: a processor with AVX-512 then also measures what one with AVX2 sees, peers included.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from .machine import ISAS, NATIVE, slug, usable_isas
from .report import write_index, write_report

HERE = Path(__file__).parent
RESULTS = HERE / "results"
_USAGE, _NOTHING_SELECTED = 4, 5
"""Exit statuses of pytest."""


def _file_of(word: str) -> Path:
    """The file of a test that pytest would know by this word, `FILE` or `FILE::TEST`."""
    return Path(word.partition("::")[0])


def options_of(words: Sequence[str] | None) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Our options, files of benchmarks or tests in them, and the words that are pytest's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--missing", action="store_true", help="only cells without results in the folder")
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="no cell begins later, and a run with --missing goes on from there",
    )
    parser.add_argument(
        "--isa",
        type=lambda text: tuple(dict.fromkeys(text.split(","))),
        default=(NATIVE,),
        metavar="LIST",
        help=f"instruction sets to measure, with commas between them: {', '.join(ISAS)} (default: {NATIVE})",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results")
    chosen, rest = parser.parse_known_args(words)
    if not chosen.budget >= 0:
        parser.error(f"--budget must be >= 0, got {chosen.budget}")
    if unknown := [isa for isa in chosen.isa if isa not in ISAS]:
        parser.error(f"--isa must be of {', '.join(ISAS)}, got {unknown[0]}")
    if unusable := [isa for isa in chosen.isa if isa != NATIVE and isa not in usable_isas()]:
        parser.error(f"--isa must be of what runs here ({', '.join(usable_isas())}), got {unusable[0]}")
    if chosen.device == "cuda" and chosen.isa != (NATIVE,):
        parser.error(f"--isa must be {NATIVE} with --device cuda, got {','.join(chosen.isa)}")
    if chosen.out is not None and chosen.out.exists() and not chosen.out.is_dir():
        parser.error(f"--out must be a folder, got the file {chosen.out}")
    files, options = [], []
    for word in rest:
        path = _file_of(word)
        if path.is_dir():
            files += sorted(map(str, path.rglob("bench_*.py")))
        elif path.suffix != ".py":
            options.append(word)
        elif path.exists():
            files.append(word)
        else:
            parser.error(f"there is no file {path}")
    return chosen, files, options


def measure(words: Sequence[str] | None = None, log: TextIO | None = None) -> dict[str, str]:
    """Measure and write the report. `log` takes what pytest prints (default: standard output).

    Returns:
        Files that did not run to their end, or in which a check failed, and how.
    """
    return _measure(*options_of(words), log)[1]


def _measure(
    chosen: argparse.Namespace, files: list[str], options: list[str], log: TextIO | None
) -> tuple[Path, dict[str, str]]:
    device, quick, out = chosen.device, chosen.quick, chosen.out
    deadline = time.monotonic() + chosen.budget
    folder = out or RESULTS / f"{datetime.date.today().isoformat()}-{slug(device)}{'-quick' * quick}"
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    seconds, rounds = (0.02, 2) if quick else (1, 3) if device == "cpu" else (0.5, 10)  # per contestant
    options += ["--benchmark-quiet", f"--benchmark-max-time={seconds}", f"--benchmark-min-rounds={rounds}"]
    options += [f"--device={device}", *["--quick"] * quick, *["--missing"] * chosen.missing]
    broken: dict[str, str] = {}
    every = files or sorted(HERE.rglob("bench_*.py"), key=lambda path: (path.parent == HERE, path.name))
    for file, isa in ((file, isa) for file in every for isa in chosen.isa):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        name = _file_of(str(file)).stem.removeprefix("bench_")
        name += "" if isa == NATIVE else f".{isa}"
        command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), str(file), *options]
        command += [f"--budget={left}", f"--benchmark-json={folder / name}.json", f"--isa={isa}"]
        code = subprocess.run(command, stdout=log, env=os.environ | ISAS[isa]).returncode
        if code == _USAGE:
            raise UsageError
        if code not in (0, _NOTHING_SELECTED):
            broken[name] = "a test failed" if code == 1 else f"ended with status {code}"
        if any(folder.glob("*.json")):
            write_report(folder, broken)
    return folder, broken


class UsageError(ValueError):
    """Pytest was given wrong options."""

    def __str__(self) -> str:
        return "pytest says above which option is wrong"


def main(words: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0 if everything ran and every check was passed."""
    chosen, files, options = options_of(words)
    if chosen.out is None and chosen.device == "cuda" and not torch.cuda.is_available():
        print("python -m benchmarks: this torch sees no GPU", file=sys.stderr)
        return _USAGE
    try:
        folder, broken = _measure(chosen, files, options, None)
    except UsageError:
        return _USAGE
    if (folder / "table.md").exists():
        if chosen.out is None and not chosen.quick and chosen.device == "cpu":
            write_index(RESULTS, folder)
        print(f"\n{folder / 'table.md'}")
    else:
        print("nothing was measured")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
