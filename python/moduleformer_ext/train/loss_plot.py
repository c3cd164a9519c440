"""The curves of several runs in one picture."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moduleformer_ext.data import ALL


@dataclass
class Curve:
    """What a run logged: a figure of its steps, and bits per byte of held-out text where it was measured."""

    steps: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Read until then."""
    values: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    """Bits per byte of all domains, by step."""

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], metric: str, model: str) -> Curve:
        """From the records of metrics.jsonl; `model` is what they call the one that is trained.

        Raises:
            ValueError: no step has such a figure, or none has any.
        """
        steps = [record for record in records if record.get("event") == "step"]
        names = sorted({name for record in steps for name, value in record.items() if isinstance(value, (int, float))})
        if not names:
            raise ValueError("metrics.jsonl has no figures of a step yet; they come as the run trains")
        if metric not in names:
            raise ValueError(f"metric must be one of {', '.join(names)}, got {metric}")
        curve = cls()
        for record in steps:
            curve.steps.append(record["step"])
            curve.tokens.append(record["tokens"])
            curve.values.append(record[metric])
        for record in records:
            if record.get("event") == "evaluation":
                curve.held_out[record["step"]] = record["bits_per_byte"][model][ALL]
        return curve

    def smoothed(self, weight: float) -> list[float]:
        """The exponential mean of the values, each with `1 - weight`, without a bias towards the first."""
        mean, total, smooth = 0.0, 0.0, []
        for value in self.values:
            mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
            smooth.append(mean / total)
        return smooth


def plot_curves(path: Path, curves: Mapping[str, Curve], *, metric: str, x: str, smoothing: float) -> None:
    """Draw the figure over `x` ("steps" or "tokens"), faint as it is and smoothed, and beside it held-out bits per
    byte, if there are any, as .png.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 1 + any(curve.held_out for curve in curves.values())
    figure = Figure(figsize=(7 * panels, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    (axes, *others) = figure.subplots(1, panels, squeeze=False)[0]
    for number, (name, curve) in enumerate(curves.items()):
        across, color = getattr(curve, x), f"C{number % 10}"
        axes.plot(across, curve.values, color=color, alpha=0.25 if smoothing else 1, linewidth=1)
        axes.plot(across, curve.smoothed(smoothing), color=color, linewidth=1.6, label=name)
        places = dict(zip(curve.steps, across, strict=True))
        measured = [(places[step], bits) for step, bits in curve.held_out.items() if step in places]
        for beside in others:
            beside.plot(*zip(*measured, strict=True), marker="o", color=color, label=name) if measured else None
    for panel, title in zip((axes, *others), (metric.replace("_", " "), "held-out bits per byte"), strict=False):
        panel.set_title(title, loc="left")
        panel.set_xlabel(x)
        panel.grid(color="0.9", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # letters that the font lacks are boxes
        figure.savefig(path, dpi=150)
