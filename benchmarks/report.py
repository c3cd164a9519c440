"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from moduleformer_ext.files import write_file

from .cells import NOT_SLOWER, OURS, REFERENCE
from .harness import CellResult, GoalOutcome
from .results import Results

TITLES = {
    "attention": "Stick-breaking attention",
    "attention-decode": "One query against a cache",
    "linear-decode": "Dense projection of a few tokens",
    "ffn": "Feed-forward experts",
    "moa": "Routed projections of the attention experts",
    "router": "Router and layout",
    "block": "A whole layer",
    "decode": "Decoding: one token through one layer",
    "model": "molm-4b-k2, 24 layers, bf16",
}
MISSING = "-"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_row(head), _row("---" for _ in head), *(_row(row) for row in rows)])


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    value = seconds * 1e3
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def _megabytes(memory: int | None) -> str:
    return MISSING if memory is None else f"{memory / 2**20:.0f}"


def _is_common(outcome: GoalOutcome) -> bool:
    return outcome.goal == str(NOT_SLOWER) or outcome.goal.startswith("memory")


def _verdict(outcome: GoalOutcome) -> str:
    if outcome.met is None:
        return "not measured"
    return "met" if outcome.met else f"missed by {outcome.missed_by:.2f}x"


def _figure(outcome: GoalOutcome) -> str:
    return _ratio(outcome.value)


def _threads(cell: CellResult) -> str:
    return {0: "GPU", 1: "1 (CPU time)"}.get(cell.threads, f"{cell.threads}")


def goals_table(results: Results) -> str:
    """The goals of single cells one by one; those that all cells share as counts and exceptions."""
    rows = [
        [TITLES.get(cell.section, cell.section), cell.case, _threads(cell), goal.goal, _figure(goal), _verdict(goal)]
        for cell in results.cells.values()
        for goal in cell.goals
        if not _is_common(goal)
    ]
    lines = [table(["Section", "Cell", "Threads", "Goal", "Measured", "Result"], rows)] if rows else []
    common: dict[str, list[tuple[CellResult, GoalOutcome]]] = {}
    for cell in results.cells.values():
        for goal in cell.goals:
            if _is_common(goal) and goal.met is not None:
                common.setdefault(goal.goal, []).append((cell, goal))
    for text, outcomes in common.items():
        met = sum(bool(goal.met) for _, goal in outcomes)
        lines.append(f"\n{text[0].upper()}{text[1:]}: met in {met} of {len(outcomes)} cells.")
        lines += [
            f"- {cell.section}, {cell.case}, {_threads(cell)} threads: {_figure(goal)}, {_verdict(goal)}"
            for cell, goal in outcomes
            if not goal.met
        ]
    return "\n".join(lines)


def section_table(cells: list[CellResult]) -> str:
    """Times in ms, then ratios to ours."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.timings if name != OURS))
    facts = list(dict.fromkeys(name for cell in cells for name in cell.facts))
    head = ["Cell", "Threads", "Ours ms", *(f"{name} ms" for name in names), "Best peer / ours", "Reference / ours"]
    head += ["Ours / roofline", "Memory MB: ours", REFERENCE, *facts]
    rows = []
    for cell in cells:
        if cell.failure is not None:
            rows.append([cell.case, _threads(cell), f"no time: {cell.failure}", *[""] * (len(head) - 3)])
            continue
        reference = cell.timings.get(REFERENCE)
        rows.append(
            [
                cell.case,
                _threads(cell),
                _ms(cell.timings[OURS].median),
                *(_ms(cell.timings[name].median) if name in cell.timings else MISSING for name in names),
                _ratio(cell.ratio(cell.best_peer)) if cell.best_peer else MISSING,
                _ratio(cell.ratio(REFERENCE)),
                _ratio(cell.roofline_ratio),
                _megabytes(cell.timings[OURS].memory),
                _megabytes(reference.memory if reference else None),
                *(f"{cell.facts[name]:.3g}" if name in cell.facts else MISSING for name in facts),
            ]
        )
    return table(head, rows)


def machine_lines(results: Results) -> str:
    """Where and how it was measured."""
    machine = results.machine
    lines = [
        f"{machine.get('cpu')}, {machine.get('cpus')} CPUs, {machine.get('system')}; torch {machine.get('torch')}, "
        f"Python {machine.get('python')}, moduleformer_ext {machine.get('moduleformer_ext')} "
        f"({machine.get('cpu_isa')} kernels).",
        "",
        "Measured limits, from which rooflines are computed:",
        "",
    ]
    rows = [
        [
            str(threads),
            *(f"{limits.matrix_flops[name] / 1e9:.0f}" for name in ("fp32", "bf16")),
            f"{limits.read_bytes / 1e9:.0f}",
        ]
        for threads, limits in sorted(results.limits.items())
    ]
    lines.append(table(["Threads", "fp32 GFLOP/s", "bf16 GFLOP/s", "Read GB/s"], rows))
    lines += [
        "",
        "Times are medians of interleaved rounds; wall time, or CPU time where one thread is used. Every contestant's "
        "result is checked against ours first. Freed memory is kept in the process (timed rounds have no page faults); "
        "memory is the rise of resident memory during a call before them. A roofline is the larger of matrix "
        "arithmetic at the measured GEMM rate and required reads at the measured bandwidth; transcendentals are not "
        "counted. Yardsticks that compute another function (softmax) are not counted as peers.",
    ]
    return "\n".join(lines)


def write_table(results: Results, directory: Path, head: Callable[[Results], str] = machine_lines) -> None:
    """``table.md``. ``head`` says where and how it was measured."""
    parts = ["# Benchmarks", head(results), "## Goals", goals_table(results)]
    for name, title in TITLES.items():
        cells = results.section(name)
        if cells:
            parts += [f"## {title}", section_table(cells)]
            if (directory / f"{name}.png").exists():
                parts.append(f"![{title}: time of each contestant over ours]({name}.png)")
        if name in results.broken:
            parts.append(f"{title}: incomplete ({results.broken[name]}).")
    write_file(directory / "table.md", "\n\n".join(parts) + "\n")


def write_index(root: Path, latest: Path) -> None:
    """``README.md`` beside the runs: the list of them, and the goals of the latest."""
    runs = sorted((path.parent.name for path in root.glob("*/table.md")), reverse=True)
    parts = [
        "# Benchmark results",
        "Written by `make bench` (`python -m benchmarks.run`). Ratios compare contestants of one run on one machine.",
        "\n".join(f"- [{name}]({name}/table.md)" for name in runs),
        f"## {latest.name}",
        machine_lines(results := Results.load(latest)),
        goals_table(results),
    ]
    write_file(root / "README.md", "\n\n".join(parts) + "\n")
