"""Measure the CUDA kernels and report: ``python -m benchmarks.gpu [--only attention,ffn] [--quick] [--out FOLDER]``.

Results go to ``benchmarks/results/<date>-<gpu>/`` (``results.json``, ``table.md``), cell by cell.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..cells import OURS, Cell
from ..harness import CellResult, Effort, Meter, measure
from ..machine import path_part
from ..report import TITLES, table, write_table
from ..results import Results
from ..run import QUICK, RESULTS, chosen_sections
from .cells import SECTIONS, usable
from .device import clocks, describe
from .meter import CudaMeter

EFFORT = Effort(seconds=0.5, min_rounds=10, max_rounds=50)


def measure_usable(cell: Cell, effort: Effort, meter: Meter) -> tuple[CellResult, dict[str, str]]:
    """A cell without the peers that fail on this machine, and why they do."""
    race, failures = usable(cell.build())
    result = measure(replace(cell, build=lambda: race), effort, meter=meter)
    if race.work is not None and race.work.flops and result.failure is None:
        result.facts["ours TFLOP/s"] = race.work.flops / result.timings[OURS].median / 1e12
    return result, failures


def run_sections(
    sections: Sequence[str], quick: bool, results: Results, directory: Path, meter: Meter, device: str
) -> bool:
    """Measure and report, saving after each cell. Whether all checks were passed."""
    left_out: dict[str, str] = {}
    results.settings |= {"quick": quick, "left_out": left_out}
    for section in sections:
        print(TITLES[section], flush=True)
        for cell in SECTIONS[section](quick):
            with torch.device(device):
                result, failures = measure_usable(cell, QUICK if quick else EFFORT, meter)
            left_out.update({f"{name}, {cell.case}": why for name, why in failures.items()})
            ratios = ", ".join(f"{peer} {result.ratio(peer):.2f}x" for peer in result.timings if peer != OURS)
            print(f"  {cell.case}: {ratios if result.failure is None else result.failure}", flush=True)
            results.cells[cell.key] = result
            results.machine["after"] = clocks()
            results.save(directory)
        write_table(results, directory, head_lines)
    return all(result.failure is None for result in results.cells.values())


def head_lines(results: Results) -> str:
    """Where and how it was measured."""
    machine = results.machine
    peers = ", ".join(f"{name} {version}" for name, version in machine.get("peers", {}).items()) or "none installed"
    lines = [
        f"{machine.get('gpu')} (compute capability {machine.get('capability')}, {machine.get('multiprocessors')} "
        f"multiprocessors, {machine.get('memory_gib')} GiB), CUDA {machine.get('cuda')}, {machine.get('system')}; "
        f"torch {machine.get('torch')}, Python {machine.get('python')}, "
        f"moduleformer_ext {machine.get('moduleformer_ext')}. Peers: {peers}.",
        "",
        "Times are medians of interleaved rounds between two CUDA events, the L2 cache flushed before each. Every "
        "contestant's result is checked against ours first. Memory is the rise of allocated device memory during a "
        "call. Yardsticks that compute another function (softmax) are not counted as peers.",
    ]
    before, after = machine.get("before", {}), machine.get("after", {})
    if before:
        rows = [[name, value, after.get(name, "-")] for name, value in before.items()]
        lines += ["", table(["nvidia-smi", "before", "after"], rows)]
    left_out = results.settings.get("left_out", {})
    if left_out:
        lines += ["", "Left out, because they fail here:", ""]
        lines += [f"- {where}: {why}" for where, why in left_out.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated sections (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--out", type=Path, help="results folder (default: benchmarks/results/<date>-<gpu>)")
    options = parser.parse_args(arguments)
    sections = chosen_sections(parser, options.only, SECTIONS)
    if not torch.cuda.is_available():
        parser.error("this torch sees no GPU")

    machine = describe()
    name = f"{datetime.date.today().isoformat()}-{path_part(str(machine['gpu']))}" + ("-quick" if options.quick else "")
    directory = (options.out or RESULTS / name).resolve()
    passed = run_sections(sections, options.quick, Results(machine), directory, CudaMeter(), "cuda")
    print(f"\n{directory / 'table.md'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
