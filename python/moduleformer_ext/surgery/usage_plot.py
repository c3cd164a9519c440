"""expert_usage.png: who uses which experts."""

from collections.abc import Mapping
from itertools import permutations
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moduleformer_ext.surgery.anatomy import KINDS
from moduleformer_ext.surgery.usage import ExpertUsage, FloatArray, layer_divergences

_TITLES = {"attention": "Attention experts", "ffn": "Feed-forward experts"}


def plot_expert_usage(path: Path, usage: Mapping[str, ExpertUsage]) -> None:
    """Draw, for both kinds of experts, each domain's frequencies by layer, and the divergence between domains.

    Two domains: KL in both directions by layer. More: the matrix of pairs, averaged over layers.
    """
    domains = sorted(usage)
    num_rows = len(domains) + (len(domains) > 1)
    num_layers = len(usage[domains[0]].counts[KINDS[0]])
    heights = [0.4 * num_layers + 0.6] * len(domains) + [2.2 if len(domains) < 3 else 3.0] * (len(domains) > 1)
    widths = [max(2.5, np.sqrt(_num_experts(usage, kind))) for kind in KINDS]
    figure, axes = plt.subplots(
        num_rows,
        len(KINDS),
        figsize=(13, sum(heights) + 1.2),
        height_ratios=heights,
        width_ratios=widths,
        squeeze=False,
        layout="constrained",
    )
    for column, kind in enumerate(KINDS):
        _draw_frequencies(figure, list(axes[: len(domains), column]), usage, domains, kind)
        if len(domains) == 2:
            _draw_layer_divergence(axes[-1, column], usage, domains, kind)
        elif len(domains) > 2:
            _draw_divergence_matrix(figure, axes[-1, column], usage, domains, kind)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _num_experts(usage: Mapping[str, ExpertUsage], kind: str) -> int:
    return max(len(counts) for counts in next(iter(usage.values())).counts[kind])


def _draw_frequencies(
    figure: Figure, axes: list[Axes], usage: Mapping[str, ExpertUsage], domains: list[str], kind: str
) -> None:
    num_experts = _num_experts(usage, kind)
    grids = {domain: _grid(usage[domain].frequencies(kind), num_experts) for domain in domains}
    top = max(float(np.nanmax(grid)) for grid in grids.values())
    for axis, domain in zip(axes, domains, strict=True):
        image = axis.imshow(100 * grids[domain], cmap="viridis", vmin=0.0, vmax=100 * top, aspect="auto")
        axis.set_title(f"{_TITLES[kind]}: {domain}")
        axis.set_ylabel("layer")
        axis.set_yticks(range(len(grids[domain])))
        axis.set_xticks(range(0, num_experts, max(1, num_experts // 16)))
    axes[-1].set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="share of the layer's slots [%]", pad=0.01)


def _grid(rows: list[FloatArray], width: int) -> FloatArray:
    """Stack rows of maybe unequal length into [L, width]; what does not exist stays blank."""
    grid = np.full((len(rows), width), np.nan)
    for layer, row in enumerate(rows):
        grid[layer, : len(row)] = row
    return grid


def _draw_layer_divergence(axis: Axes, usage: Mapping[str, ExpertUsage], domains: list[str], kind: str) -> None:
    for index, (a, b) in enumerate(permutations(domains)):
        values = layer_divergences(usage[a], usage[b], kind)
        axis.bar(np.arange(len(values)) + 0.4 * (index - 0.5), values, width=0.38, label=f"KL({a} ‖ {b})")
    axis.set_xticks(range(len(values)))
    axis.set_xlabel("layer")
    axis.set_ylabel("KL divergence [nats]")
    axis.set_title(f"{_TITLES[kind]}: divergence between domains")
    axis.margins(y=0.25)
    axis.legend(loc="upper left", ncols=2, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_divergence_matrix(
    figure: Figure, axis: Axes, usage: Mapping[str, ExpertUsage], domains: list[str], kind: str
) -> None:
    matrix = np.array([[layer_divergences(usage[a], usage[b], kind).mean() for b in domains] for a in domains])
    image = axis.imshow(matrix, cmap="magma_r", vmin=0.0, aspect="auto")
    for (row, column), value in np.ndenumerate(matrix):
        shade = "white" if value > 0.5 * matrix.max() else "black"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade)
    axis.set_xticks(range(len(domains)), domains)
    axis.set_yticks(range(len(domains)), domains)
    axis.set_title(f"{_TITLES[kind]}: KL(row ‖ column), mean over layers")
    figure.colorbar(image, ax=axis, label="nats", pad=0.01)
