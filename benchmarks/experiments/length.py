"""Experiment 2: length extrapolation. Models trained on short windows read longer ones.

python -m benchmarks.experiments.length
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .cells import Result
from .language_modelling import TITLES
from .report import COLOURS, markdown_table, new_figure, save_figure, verdict, write_report
from .setting import Setting, make_parser, make_setting, mean_and_spread
from .training import as_tokens, window_losses

NAMES = ("molm-mi", "molm-rotary", "dense-total")


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate the trained models of experiment 1 (training what is missing), write the report."""
    options = make_parser("length", "Length extrapolation.").parse_args(arguments)
    setting = make_setting("length", options)
    results = {name: [_evaluated(setting, name, seed) for seed in setting.seeds] for name in NAMES}
    report(setting, results)


def lengths(setting: Setting) -> list[int]:
    """Doubling from the length of training to the longest."""
    size = setting.size
    return [size.length << i for i in range(int(math.log2(size.longest // size.length)) + 1)]


def _evaluated(setting: Setting, name: str, seed: int) -> Result:
    setting.first_training(name, seed)
    return setting.cells.measured(f"length-{name}", seed, lambda: evaluate_lengths(setting, name, seed))


def evaluate_lengths(setting: Setting, name: str, seed: int) -> Result:
    """Bits per token in windows of every length, over the same tokens; and by position in the longest windows."""
    model = setting.cells.model(name, seed)
    longest = lengths(setting)[-1]
    parts = []
    for stream in setting.old.held_out.values():
        tokens = as_tokens(stream)
        if windows := (len(tokens) - 1) // longest:
            parts.append(tokens[: windows * longest + 1])
    if not parts:
        raise ValueError(f"length: the held-out text of some domain must fill a window of {longest} tokens, got less")
    bits: dict[str, float] = {}
    by_position = torch.zeros(0)
    for length in lengths(setting):
        losses = torch.cat([window_losses(model, tokens, length) for tokens in parts]) / math.log(2)
        bits[str(length)] = losses.double().mean().item()
        by_position = losses.view(-1, length).mean(0)
    blocks = by_position.view(-1, setting.size.length).mean(1)
    return {"bits_per_token": bits, "by_position": blocks.tolist()}


def report(setting: Setting, results: dict[str, list[Result]]) -> None:
    """Table, picture, verdict."""
    tested = lengths(setting)
    rows = [
        [TITLES[name], *(mean_and_spread([r["bits_per_token"][str(length)] for r in found]) for length in tested)]
        for name, found in results.items()
    ]

    def change(name: str) -> np.ndarray:
        """From the trained to the longest window, in bits per token, by seed."""
        first, last = str(tested[0]), str(tested[-1])
        return np.array([r["bits_per_token"][last] - r["bits_per_token"][first] for r in results[name]])

    stick, rotary = change("molm-mi"), change("molm-rotary")
    about = (
        f"Held-out bits per token in windows of so many tokens, the same tokens for every length; the models were "
        f"trained on windows of {tested[0]}. Mean of {len(setting.seeds)} seeds ± half their range."
    )
    shown = verdict(
        "Stick-breaking attention is no worse in windows longer than those trained on, rotary positions are.",
        bool(stick.max() <= 0 and rotary.min() > 0),
        f"from {tested[0]} to {tested[-1]} tokens stick-breaking changes by {stick.mean():+.3f} bits per token, softmax"
        f" with rotary positions by {rotary.mean():+.3f}, the dense model by {change('dense-total').mean():+.3f}.",
    )
    write_report(
        setting.results,
        "Length extrapolation",
        [about, markdown_table(["model", *map(str, tested)], rows), "![By length](length.png)", shown],
        {"size": vars(setting.size), "seeds": setting.seeds, "results": results},
    )
    _draw(setting, results, tested)


def _draw(setting: Setting, results: dict[str, list[Result]], tested: list[int]) -> None:
    figure, (by_length, by_position) = new_figure(2, width=5.5)
    for i, (name, found) in enumerate(results.items()):
        by_length.plot(
            tested,
            np.mean([[r["bits_per_token"][str(length)] for length in tested] for r in found], axis=0),
            "o-",
            color=COLOURS[i],
            label=TITLES[name],
        )
        blocks = np.mean([r["by_position"] for r in found], axis=0)
        centres = (np.arange(len(blocks)) + 0.5) * setting.size.length
        by_position.plot(centres, blocks, ".-", color=COLOURS[i], label=TITLES[name])
    by_length.set_xscale("log", base=2)
    by_length.set_xticks(tested, [str(length) for length in tested])
    by_length.set_xlabel("window [tokens]")
    by_length.set_ylabel("held-out bits per token")
    by_position.set_xlabel(f"position in a window of {tested[-1]} tokens")
    for axis in (by_length, by_position):
        axis.axvline(setting.size.length, color="black", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.3)
    by_length.legend(frameon=False)
    save_figure(figure, setting.results / "length.png")


if __name__ == "__main__":
    main()
