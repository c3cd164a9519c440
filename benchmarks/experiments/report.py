"""Tables and pictures of the experiments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moduleformer_ext.files import write_file

from ..machine import describe

COLOURS = ("#1b6ca8", "#e07b39", "#4a9c5d", "#8c4fa3", "#7a7a7a", "#c0392b", "#2aa198", "#b58900")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text."""
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(head) - 1)])]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(row) for row in rows)])


def write_report(directory: Path, title: str, paragraphs: Sequence[str], data: Mapping[str, Any]) -> None:
    """table.md and results.json, with the machine they come from."""
    machine = describe()
    where = f"{machine['cpu']}, torch {machine['torch']}, moduleformer_ext {machine['moduleformer_ext']}."
    write_file(directory / "table.md", "\n\n".join([f"# {title}", *paragraphs, where]) + "\n")
    record = {"machine": machine, **data}
    write_file(directory / "results.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"{directory / 'table.md'}\n\n" + "\n\n".join(paragraphs))


def new_figure(columns: int = 1, *, width: float = 6.0, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A row of axes."""
    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def save_figure(figure: Figure, path: Path) -> None:
    """Write as PNG and forget."""
    figure.savefig(path, dpi=120)
    plt.close(figure)


def verdict(claim: str, shows: bool, evidence: str) -> str:
    """One line on a claim of the paper."""
    return f"**{claim}** {'Shows' if shows else 'Does not show'} here: {evidence}"
