"""Results as pictures: one per section, plus attention's memory and decoding's time by cache length."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from .cells import BEST_PEER, OURS
from .harness import CellResult
from .report import TITLES
from .results import Results

_MARKERS = "os^Dvph*X"
_COLORS = ("#d1495b", "#edae49", "#00798c", "#6a4c93", "#30638e", "#7a9e7e", "#8d6a9f")
_ROW_INCHES = 0.24


def _finish(axes: Axes, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(axes.figure)


def _times(value: float, _: object = None) -> str:
    return f"{value:g}x"


def speedups(cells: list[CellResult], title: str, path: Path) -> None:
    """A row per cell, a mark per contestant at its time over ours; left of the line it is faster than ours."""
    cells = [cell for cell in cells if cell.failure is None and len(cell.timings) > 1]
    if not cells:
        return
    names = list(dict.fromkeys(name for cell in cells for name in cell.timings if name != OURS))
    _, axes = plt.subplots(figsize=(8.5, 1.4 + _ROW_INCHES * len(cells)))
    rows = range(len(cells))
    for index, name in enumerate(names):
        points = [(ratio, row) for row, cell in zip(rows, cells, strict=True) if (ratio := cell.ratio(name))]
        style = {"marker": _MARKERS[index % len(_MARKERS)], "color": _COLORS[index % len(_COLORS)]}
        axes.scatter(*zip(*points, strict=True), label=name, s=26, zorder=3, linewidths=0, **style)
        for row, cell in zip(rows, cells, strict=True):
            if bound := _speedup_goal(cell, name):
                axes.plot([bound, bound], [row - 0.4, row + 0.4], color=style["color"], linewidth=1.5, zorder=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_formatter(FuncFormatter(_times))
    axes.xaxis.set_minor_formatter(FuncFormatter(_times) if high < 10 * low else NullFormatter())
    axes.set_yticks(list(rows), [f"{cell.case}, {_thread_word(cell)}" for cell in cells], fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", color="0.9", linewidth=0.6)
    axes.set_xlabel("time over ours (log scale); right of 1x ours is faster; bars: goals")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=8, frameon=False)
    _finish(axes, path)


def _speedup_goal(cell: CellResult, name: str) -> float | None:
    """The ratio to ``name`` that was aimed at, where it is not plainly 1."""
    for outcome in cell.goals:
        if (match := re.fullmatch(r"≥ ([\d.]+)x (.+)", outcome.goal)) and float(match[1]) != 1:
            against = cell.best_peer if match[2] == BEST_PEER else match[2]
            if against == name:
                return float(match[1])
    return None


def _thread_word(cell: CellResult) -> str:
    return "1 thread" if cell.threads == 1 else f"{cell.threads} threads"


def _curves(cells: list[CellResult], quantity: Callable[[CellResult, str], float | None], axes: Axes) -> None:
    names = list(dict.fromkeys(name for cell in cells for name in cell.timings))
    for index, name in enumerate(names):
        points = [
            (int(cell.tags["tokens"]), value)
            for cell in cells
            if name in cell.timings and (value := quantity(cell, name)) is not None
        ]
        if points:
            color = "black" if name == OURS else _COLORS[index % len(_COLORS)]
            axes.plot(
                *zip(*sorted(points), strict=True), marker=_MARKERS[index % len(_MARKERS)], color=color, label=name
            )
    lengths = sorted({int(cell.tags["tokens"]) for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.grid(which="both", color="0.9", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False)


def attention_memory(cells: list[CellResult], path: Path) -> None:
    chosen = [
        cell
        for cell in cells
        if cell.threads == 2
        and cell.failure is None
        and (cell.tags["dtype"], cell.tags["direction"], cell.tags["kind"]) == ("fp32", "forward+backward", "ε = 0")
    ]
    if not chosen:
        return

    def megabytes(cell: CellResult, name: str) -> float | None:
        memory = cell.timings[name].memory
        return memory / 2**20 if memory else None

    _, axes = plt.subplots(figsize=(6, 4))
    _curves(chosen, megabytes, axes)
    axes.set_xlabel("tokens")
    axes.set_ylabel("peak memory beyond inputs, MB (log scale)")
    axes.set_title("Attention, fp32, forward+backward", loc="left", fontsize=11)
    _finish(axes, path)


def decode_times(cells: list[CellResult], path: Path) -> None:
    chosen = [
        cell
        for cell in cells
        if cell.failure is None
        and (cell.threads, cell.tags["dtype"], cell.tags["kind"]) == (1, "fp32", "sticks exhausted")
    ]
    if not chosen:
        return
    _, axes = plt.subplots(figsize=(6, 4))
    _curves(chosen, lambda cell, name: cell.timings[name].median * 1e3, axes)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("ms per token and layer, CPU time (log scale)")
    axes.set_title("Decoding one token, fp32, one thread", loc="left", fontsize=11)
    _finish(axes, path)


def draw(results: Results, directory: Path) -> None:
    """All pictures that the results allow."""
    for name, title in TITLES.items():
        speedups(results.section(name), title, directory / f"{name}.png")
    attention_memory(results.section("attention"), directory / "attention_memory.png")
    decode_times(results.section("decode"), directory / "decode_times.png")
