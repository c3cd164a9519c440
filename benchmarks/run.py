"""Measure everything and report: ``python -m benchmarks.run [--quick] [--only attention,ffn] [--missing]``.

Results go to ``benchmarks/results/<date>-<machine>/`` (``results.json``, ``table.md``, pictures), cell by cell. A run
into a folder that has results replaces only the cells that it measures; ``--missing`` measures only those not there.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import math
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from moduleformer_ext.heap import keep_freed_memory

from .cells import Cell
from .harness import CellResult, Effort, measure
from .machine import describe, measure_limits, slug
from .report import TITLES, write_index, write_table
from .results import Results

SECTIONS = {
    "attention": "benchmarks.ops.bench_stick_attention",
    "attention-decode": "benchmarks.ops.bench_stick_attention_decode",
    "linear-decode": "benchmarks.ops.bench_linear_decode",
    "ffn": "benchmarks.ops.bench_expert_ffn",
    "moa": "benchmarks.ops.bench_grouped_gemm",
    "router": "benchmarks.ops.bench_route_topk",
    "block": "benchmarks.bench_block",
    "decode": "benchmarks.bench_decode",
    "model": "benchmarks.bench_model",
}
THREADS = (1, 2)
CHECK_FAILED = 3
"""Exit status of a section whose contestants disagree."""
RESULTS = Path(__file__).parent / "results"
QUICK = Effort(seconds=0.02, min_rounds=2, max_rounds=3)


def section_cells(section: str, quick: bool) -> Iterator[Cell]:
    """The cells of one section. Quick ones are too small for a second thread, and for goals."""
    seen: set[str] = set()
    for cell in importlib.import_module(SECTIONS[section]).cells(quick=quick):
        if quick:
            cell = replace(cell, goals=(), threads=1)
        if cell.key not in seen:
            yield cell
        seen.add(cell.key)


def _say(result: CellResult, seconds: float) -> None:
    if result.failure is not None:
        print(f"  {result.case}: CHECK FAILED: {result.failure}", flush=True)
        return
    ratios = ", ".join(f"{name} {result.ratio(name):.2f}x" for name in result.timings if name != "ours")
    threads = "thread" if result.threads == 1 else "threads"
    print(f"  {result.case}, {result.threads} {threads}: {ratios}  [{seconds:.0f} s]", flush=True)


def run_section(section: str, directory: Path, *, quick: bool, missing: bool, match: str, budget: float) -> bool:
    """Measure the cells of one section, saving after each, and begin none after ``budget`` seconds. Whether all checks
    were passed.
    """
    deadline = time.monotonic() + budget
    keep_freed_memory(one_arena=True)
    passed = True
    for cell in section_cells(section, quick):
        results = Results.load(directory)
        if not re.search(match, cell.key) or (missing and cell.key in results.cells):
            continue
        if time.monotonic() > deadline:
            break
        start = time.perf_counter()
        result = measure(cell, QUICK if quick else Effort(), results.limits.get(cell.threads))
        _say(result, time.perf_counter() - start)
        results.cells[cell.key] = result
        results.save(directory)
        passed = passed and result.failure is None
    return passed


def _begin(directory: Path, quick: bool) -> None:
    """Describe the machine and measure its limits."""
    results = Results.load(directory)
    results.machine = describe()
    results.settings = {"quick": quick}
    results.limits = {threads: measure_limits(threads, seconds=0.05 if quick else 0.6) for threads in THREADS}
    results.save(directory)


def _worker(section: str, directory: Path, arguments: argparse.Namespace, budget: float) -> str | None:
    """Measure a section in a process of its own: neither memory nor a crash reaches the next one."""
    command = [sys.executable, "-m", "benchmarks.run", "--worker", section, "--out", str(directory)]
    command += ["--match", arguments.match, "--budget", str(budget)]
    command += [flag for flag, given in (("--quick", arguments.quick), ("--missing", arguments.missing)) if given]
    code = subprocess.run(command, cwd=Path(__file__).parent.parent).returncode
    return None if code == 0 else "a check failed" if code == CHECK_FAILED else f"ended with status {code}"


def chosen_sections(parser: argparse.ArgumentParser, only: str, known: Collection[str]) -> list[str]:
    """The sections that ``--only`` names."""
    sections = [name for name in only.split(",") if name]
    unknown = [name for name in sections if name not in known]
    if unknown:
        parser.error(f"--only must name sections among {', '.join(known)}, got {', '.join(unknown)}")
    return sections


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated sections (default: all)")
    parser.add_argument("--match", default="", help="only cells whose key (see --list) matches this regular expression")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--missing", action="store_true", help="only cells without results in the folder")
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="begin no cell later than this; a run with --missing goes on from there",
    )
    parser.add_argument("--out", type=Path, help="results folder (default: benchmarks/results/<date>-<machine>)")
    parser.add_argument("--list", action="store_true", help="list the cells and stop")
    parser.add_argument("--worker", choices=SECTIONS, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    parsed.sections = chosen_sections(parser, parsed.only, SECTIONS)
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if everything ran and every check was passed."""
    options = _parse(arguments)
    if options.list:
        for section in options.sections:
            for cell in section_cells(section, options.quick):
                print(cell.key)
        return 0
    name = f"{datetime.date.today().isoformat()}-{slug()}" + ("-quick" if options.quick else "")
    directory = (options.out or RESULTS / name).resolve()
    if options.worker:
        passed = run_section(
            options.worker,
            directory,
            quick=options.quick,
            missing=options.missing,
            match=options.match,
            budget=options.budget,
        )
        return 0 if passed else CHECK_FAILED

    from .plots import draw

    deadline = time.monotonic() + options.budget
    _begin(directory, options.quick)
    for section in options.sections:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        print(TITLES[section], flush=True)
        failure = _worker(section, directory, options, left)
        results = Results.load(directory)
        results.broken.pop(section, None)
        if failure is not None:
            results.broken[section] = failure
        results.save(directory)
        draw(results, directory)
        write_table(results, directory)
    if options.out is None and not options.quick:
        write_index(RESULTS, directory)
    print(f"\n{directory / 'table.md'}")
    return 1 if Results.load(directory).broken else 0


if __name__ == "__main__":
    sys.exit(main())
