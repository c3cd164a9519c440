"""A folder of pytest-benchmark's files as Markdown and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

from moduleformer_ext.files import write_file

from .machine import NATIVE, path_part
from .race import BEST_PEER, LIMIT, MEMORY, OURS, REFERENCE

MISSING = "-"
_MARKERS = "os^Dvph*X"
_COLORS = ("#d1495b", "#edae49", "#00798c", "#6a4c93", "#30638e", "#7a9e7e", "#8d6a9f")


@dataclass(frozen=True)
class Verdict:
    """What became of a goal."""

    goal: str
    value: float | None
    missed_by: float | None
    """By which factor, 1.1 = ten percent short; at most 1 where it is met, None where the figure is missing."""

    def __str__(self) -> str:
        if self.missed_by is None:
            return "not measured"
        return "met" if self.missed_by <= 1 else f"missed by {self.missed_by:.2f}x"


@dataclass(frozen=True)
class Cell:
    """The rows of pytest-benchmark, one per contestant, that one test wrote."""

    rows: dict[str, dict[str, Any]]

    @cached_property
    def info(self) -> dict[str, Any]:
        return self.rows[OURS]["extra_info"]

    @property
    def isa(self) -> str:
        """What the process was restricted to."""
        return self.info.get("isa", NATIVE)

    @property
    def threads(self) -> str:
        threads = {0: "GPU", 1: "1 (CPU time)"}.get(self.info["threads"], str(self.info["threads"]))
        return threads if self.isa == NATIVE else f"{threads}, {self.isa}"

    @property
    def label(self) -> str:
        """In a picture."""
        threads = {0: "GPU", 1: "1 thread"}.get(self.info["threads"], f"{self.info['threads']} threads")
        return ", ".join([self.info["case"], threads, *([] if self.isa == NATIVE else [self.isa])])

    def median(self, name: str) -> float | None:
        return self.rows[name]["stats"]["median"] if name in self.rows else None

    def memory(self, name: str) -> int | None:
        return self.rows[name]["extra_info"]["memory"] if name in self.rows else None

    def ratio(self, name: str) -> float | None:
        """How many times longer a contestant takes than ours."""
        other, ours = self.median(name), self.median(OURS)
        return other / ours if other is not None and ours else None

    @property
    def best_peer(self) -> str | None:
        comparable = [name for name, row in self.rows.items() if row["extra_info"]["comparable"]]
        peers = [name for name in comparable if not name.startswith(OURS)]
        return min(peers, key=lambda name: self.median(name) or 0, default=None)

    @property
    def over_limit(self) -> float | None:
        """How many times longer ours takes than the machine needs at best."""
        return 1 / self.info["of_limit"] if self.info["of_limit"] else None

    def judge(self, name: str, bound: float) -> Verdict:
        """A goal of `benchmarks.race.Race`."""
        if name == LIMIT:
            value = self.over_limit
            return Verdict(f"≤ {bound:g}x limit", value, value / bound if value else None)
        if name.startswith(MEMORY):
            ours, other = self.memory(OURS), self.memory(name.removeprefix(MEMORY))
            value = ours / max(other, 1) if ours and other is not None else None
            return Verdict(
                f"{MEMORY}ours ≤ {bound:g}x {name.removeprefix(MEMORY)}", value, value / bound if value else None
            )
        peer = self.best_peer if name == BEST_PEER else name
        value = self.ratio(peer) if peer else None
        return Verdict(f"≥ {bound:g}x {name}", value, bound / value if value else None)


@dataclass(frozen=True)
class Run:
    """What one folder of results holds."""

    files: list[dict[str, Any]]
    """As pytest-benchmark wrote them."""
    broken: dict[str, str]
    """Processes that ended before their last cell, and how."""

    @classmethod
    def load(cls, folder: Path, broken: dict[str, str] | None = None) -> Run:
        return cls([json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))], broken or {})

    @property
    def machine(self) -> dict[str, Any]:
        return self.files[-1]["machine_info"] if self.files else {}

    @cached_property
    def cells(self) -> list[Cell]:
        """Those of one test follow one another, whatever instruction sets they are of."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for row in (row for file in self.files for row in file["benchmarks"]):
            info = row["extra_info"]
            of_test = found.setdefault(info["cell"], {})
            of_test.setdefault(info.get("isa", NATIVE), {})[info["contestant"]] = row
        return [Cell(rows) for of_test in found.values() for rows in of_test.values()]

    @property
    def sections(self) -> dict[str, list[Cell]]:
        """By title."""
        sections: dict[str, list[Cell]] = {}
        for cell in self.cells:
            sections.setdefault(cell.info["section"], []).append(cell)
        return sections

    @property
    def failures(self) -> dict[str, str]:
        """Cells without times, and why."""
        return {
            cell if file.get("isa", NATIVE) == NATIVE else f"{cell} ({file['isa']})": why
            for file in self.files
            for cell, why in file["failures"].items()
        }

    @property
    def limits(self) -> dict[str, dict[str, Any]]:
        """The best that was measured, by number of threads and instruction set."""
        best: dict[str, dict[str, Any]] = {}
        for file, isa in ((file, file.get("isa", NATIVE)) for file in self.files):
            for threads, limits in file["limits"].items():
                name = threads if isa == NATIVE else f"{threads}, {isa}"
                known = best.setdefault(name, {"read_bytes": 0.0, **dict.fromkeys(limits["matrix_flops"])})
                known["read_bytes"] = max(known["read_bytes"], limits["read_bytes"])
                for dtype, flops in limits["matrix_flops"].items():
                    known[dtype] = max(filter(None, (known[dtype], flops)), default=None)
        return dict(sorted(best.items()))

    @property
    def products_left_out(self) -> dict[str, str]:
        """What the limits were measured without, and why."""
        found = {}
        for file in self.files:
            of = "" if file.get("isa", NATIVE) == NATIVE else f" ({file['isa']})"
            for limits in file["limits"].values():
                found |= {f"{product}{of}": why for product, why in limits.get("left_out", {}).items()}
        return found


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


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


def _shared(cells: list[Cell], name: str, goal: str) -> Iterator[str]:
    """A goal of many cells as a count and its exceptions."""
    verdicts = [(cell, cell.judge(name, 1.0)) for cell in cells]
    missed = [(cell, v) for cell, v in verdicts if v.missed_by is not None and v.missed_by > 1]
    known = sum(verdict.missed_by is not None for _, verdict in verdicts)
    if known:
        yield f"\n{goal}: met in {known - len(missed)} of {known} cells."
    for cell, verdict in missed:
        info = cell.info
        value = f"{_ratio(verdict.value)} {cell.best_peer}" if name == BEST_PEER else _ratio(verdict.value)
        yield f"- {info['section']}, {info['case']}, {cell.threads} threads: {value}, {verdict}"


def goals_table(run: Run) -> str:
    """Where a peer is faster comes first. Then the goals of single cells one by one, and those that many cells share as
    counts and exceptions.
    """
    rows = []
    memory: dict[str, list[Cell]] = {}
    for cell in run.cells:
        for name, bound in cell.info["goals"].items():
            if name.startswith(MEMORY):
                memory.setdefault(name, []).append(cell)
                continue
            verdict = cell.judge(name, bound)
            where = [cell.info["section"], cell.info["case"], cell.threads]
            rows.append([*where, verdict.goal, _ratio(verdict.value), str(verdict)])
    lines = list(_shared(run.cells, BEST_PEER, "No peer is faster"))
    lines += ["", table(["Section", "Cell", "Threads", "Goal", "Measured", "Result"], rows)] if rows else []
    for name, cells in memory.items():
        lines += _shared(cells, name, f"No more memory than {name.removeprefix(MEMORY)}")
    return "\n".join(lines).lstrip()


def section_table(cells: list[Cell]) -> str:
    """Times in ms, then ratios to ours."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.rows if name != OURS))
    facts = list(dict.fromkeys(name for cell in cells for name in cell.info["facts"]))
    head = ["Cell", "Threads", "Ours ms", *(f"{name} ms" for name in names), "Best peer / ours", "Reference / ours"]
    head += ["Ours / limit", "Ours TFLOP/s", "Memory MB: ours", REFERENCE, *facts]
    rows = []
    for cell in cells:
        flops, ours = cell.info["flops"], cell.median(OURS)
        rows.append(
            [
                cell.info["case"],
                cell.threads,
                *(_ms(cell.median(name)) for name in (OURS, *names)),
                *(_ratio(cell.ratio(name)) if name else MISSING for name in (cell.best_peer, REFERENCE)),
                _ratio(cell.over_limit),
                f"{flops / ours / 1e12:.3g}" if flops and ours else MISSING,
                *(_megabytes(cell.memory(name)) for name in (OURS, REFERENCE)),
                *(f"{cell.info['facts'][name]:.3g}" if name in cell.info["facts"] else MISSING for name in facts),
            ]
        )
    return table(head, rows)


def machine_lines(run: Run) -> str:
    """Where and how it was measured."""
    machine = run.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items())
    about = f"{machine.get('cpu')}, {machine.get('cpus')} CPUs, {machine.get('system')}"
    if "gpu" in machine:
        about = (
            f"{machine['gpu']} (compute capability {machine['capability']}, {machine['multiprocessors']} "
            f"multiprocessors, {machine['memory_gib']} GiB), CUDA {machine['cuda']}; {about}"
        )
    lines = [
        f"{about}; torch {machine.get('torch')}, Python {machine.get('python')}, moduleformer_ext "
        f"{machine.get('moduleformer_ext')} ({machine.get('cpu_isa')} kernels); {packages or 'no other library'}.",
        "",
        table(
            ["Threads", "fp32 GFLOP/s", "bf16 GFLOP/s", "Read GB/s"],
            (
                [
                    "GPU" if threads == "0" else threads,
                    *(f"{best[name] / 1e9:.0f}" if best[name] else "not available" for name in ("fp32", "bf16")),
                    f"{best['read_bytes'] / 1e9:.0f}",
                ]
                for threads, best in run.limits.items()
            ),
        ),
        "",
        "The best of what was measured, once per section and number of threads. Times are medians of interleaved "
        "rounds: wall time, CPU time where one thread is used, on a GPU the time between two events with the L2 cache "
        "flushed before each. Every contestant's result is checked against ours first. Freed memory is kept in the "
        "process (timed rounds have no page faults); memory is the rise of resident (on a GPU allocated) memory during "
        "a call before them. The limit of a cell is the larger of matrix arithmetic at the measured GEMM rate and "
        "required reads at the measured bandwidth; transcendentals are not counted. Yardsticks that compute another "
        "function (softmax) are not counted as peers.",
    ]
    if before := machine.get("before"):
        rows = ([name, value, machine["after"].get(name, MISSING)] for name, value in before.items())
        lines += ["", table(["nvidia-smi", "before", "after"], rows)]
    return "\n".join(lines)


def _speedup_goal(cell: Cell, name: str) -> float | None:
    """The ratio to `name` that was aimed at, where it is not plainly 1."""
    aims = cell.info["goals"]
    bound = aims.get(name) or (aims.get(BEST_PEER) if name == cell.best_peer else None)
    return None if bound == 1 else bound


def draw(cells: list[Cell], title: str, path: Path) -> None:
    """A row per cell, a mark per contestant at its time over ours; left of the line it is faster than ours."""

    def times(value: float, _: object = None) -> str:
        return f"{value:g}x"

    names = list(dict.fromkeys(name for cell in cells for name in cell.rows if name != OURS))
    figure, axes = plt.subplots(figsize=(8.5, 1.4 + 0.24 * len(cells)))
    for index, name in enumerate(names):
        style = {"marker": _MARKERS[index % len(_MARKERS)], "color": _COLORS[index % len(_COLORS)]}
        points = [(ratio, row) for row, cell in enumerate(cells) if (ratio := cell.ratio(name))]
        axes.scatter(*zip(*points, strict=True), label=name, s=26, zorder=3, linewidths=0, **style)
        for row, cell in enumerate(cells):
            if bound := _speedup_goal(cell, name):
                axes.plot([bound, bound], [row - 0.4, row + 0.4], color=style["color"], linewidth=1.5, zorder=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_formatter(FuncFormatter(times))
    axes.xaxis.set_minor_formatter(FuncFormatter(times) if high < 10 * low else NullFormatter())
    axes.set_yticks(range(len(cells)), [cell.label for cell in cells], fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", color="0.9", linewidth=0.6)
    axes.set_xlabel("time over ours (log scale); right of 1x ours is faster; bars: goals")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def write_report(folder: Path, broken: dict[str, str]) -> None:
    """`table.md` and a picture per section."""
    run = Run.load(folder, broken)
    parts = ["# Benchmarks", machine_lines(run), "## Goals", goals_table(run)]
    for title, cells in run.sections.items():
        picture = f"{path_part(title)}.png"
        draw([cell for cell in cells if len(cell.rows) > 1], title, folder / picture)
        parts += [f"## {title}", section_table(cells), f"![{title}: time of each contestant over ours]({picture})"]
    left_out = [f"- limit of {product}: {why}" for product, why in run.products_left_out.items()]
    left_out += [
        f"- {name}, {cell.info['section']}, {cell.info['case']}: {why}"
        for cell in run.cells
        for name, why in cell.info["left_out"].items()
    ]
    for title, lines in (
        ("No time", [f"- {cell}: {why}" for cell, why in run.failures.items()]),
        ("Incomplete", [f"- {name}: {how}" for name, how in run.broken.items()]),
        ("Left out, because they fail here", left_out),
    ):
        if lines:
            parts += [f"## {title}", "\n".join(lines)]
    write_file(folder / "table.md", "\n\n".join(parts) + "\n")


def write_index(root: Path, latest: Path) -> None:
    """`README.md` beside the runs: the list of them, and the goals of the latest."""
    runs = sorted((path.parent.name for path in root.glob("*/table.md")), reverse=True)
    run = Run.load(latest)
    parts = [
        "# Benchmark results",
        "Written by `make bench` (`python -m benchmarks`). Ratios compare contestants of one run on one machine.",
        "\n".join(f"- [{name}]({name}/table.md)" for name in runs),
        f"## {latest.name}",
        machine_lines(run),
        goals_table(run),
    ]
    write_file(root / "README.md", "\n\n".join(parts) + "\n")
