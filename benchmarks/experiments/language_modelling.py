"""Experiment 1: language modelling and ablation (the paper's Table 4, in small).

MoLM with the mutual-information loss, without a balancing loss, with the switch loss, and with softmax attention and
rotary positions, against dense Transformers of equal active and of equal total size: equal data, equal steps.

    python -m benchmarks.experiments.language_modelling
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from moduleformer_ext.heap import keep_freed_memory
from moduleformer_ext.models import KVCache, MoLMConfig
from moduleformer_ext.surgery import ExpertUsage
from moduleformer_ext.train.optimizer import build_optimizer

from ..machine import peak_extra_bytes
from .baselines import Model, active_parameters
from .cells import Result
from .report import COLOURS, markdown_table, new_figure, save_figure, verdict, write_report
from .setting import VARIANTS, Setting, make_parser, make_setting, mean_and_spread
from .training import make_reader

TITLES = {
    "molm-mi": "MoLM, mutual-information loss",
    "molm-none": "MoLM, no balancing loss",
    "molm-switch": "MoLM, switch loss",
    "molm-rotary": "MoLM, softmax + rotary positions",
    "dense-active": "dense, equal active size",
    "dense-total": "dense, equal total size",
}
_ROUNDS = 7
_NEW_TOKENS = 64


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, time it, write the report."""
    options = make_parser("language_modelling", "Language modelling and ablation.").parse_args(arguments)
    keep_freed_memory()
    setting = make_setting("language_modelling", options)
    results = {name: [setting.first_training(name, seed) for seed in setting.seeds] for name in VARIANTS}
    timing = setting.cells.measured("timing", 0, lambda: measure_speed(setting))
    report(setting, results, timing)


def measure_speed(setting: Setting) -> Result:
    """Tokens per second in training and generation, in interleaved rounds, and the memory of either."""
    calls = {name: _speed_calls(setting, name) for name in VARIANTS}
    memory = {name: {what: peak_extra_bytes(call) for what, (call, _) in pair.items()} for name, pair in calls.items()}
    times: dict[str, dict[str, list[float]]] = {name: {what: [] for what in pair} for name, pair in calls.items()}
    for _ in range(_ROUNDS):
        for name, pair in calls.items():
            for what, (call, _) in pair.items():
                start = time.perf_counter()
                call()
                times[name][what].append(time.perf_counter() - start)
    speed = {
        name: {what: tokens / median(times[name][what]) for what, (_, tokens) in pair.items()}
        for name, pair in calls.items()
    }
    return {"threads": torch.get_num_threads(), "tokens_per_second": speed, "memory_bytes": memory}


def _speed_calls(setting: Setting, name: str) -> dict[str, tuple[Callable[[], object], int]]:
    """What is timed, and how many tokens one call handles."""
    size = setting.size
    model = setting.cells.model(name, setting.seeds[0])
    optimizer = build_optimizer(model, setting.options())
    reader = make_reader(setting.old.train, size.batch_size, size.length, seed=0)
    prompt = reader.next().inputs[:1]

    def train_step() -> None:
        model.train()
        inputs, targets = reader.next()
        F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.zero_grad()

    return {
        "training": (train_step, reader.num_tokens),
        "generation": (lambda: generate(model.eval(), prompt, _NEW_TOKENS), _NEW_TOKENS),
    }


@torch.no_grad()
def generate(model: Model, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy continuation of prompt [1, T] by ``new_tokens`` tokens, the same loop for every model."""
    capacity = prompt.shape[1] + new_tokens
    cache: KVCache | None = KVCache.empty(model.config.n_layer, capacity)
    tokens = [prompt]
    for _ in range(new_tokens):
        output = model(tokens[-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens.append(output.logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1)


def idle_experts(result: Result) -> float:
    """Share of the feed-forward experts that get less than a tenth of their fair share of slots."""
    usage = sum_usage(result)
    shares = [frequency * len(frequency) for frequency in usage.frequencies("ffn")]
    return float(np.mean(np.concatenate(shares) < 0.1))


def sum_usage(result: Result) -> ExpertUsage:
    """The slots of all domains together."""
    first, *others = (ExpertUsage.from_dict(counts) for counts in result["usage"].values())
    return sum(others, first)


def report(setting: Setting, results: dict[str, list[Result]], timing: Result) -> None:
    """Table, picture, verdicts."""
    domains = setting.old.domains
    bits = {
        name: {domain: [r["bits_per_byte"][domain] for r in found] for domain in domains}
        for name, found in results.items()
    }
    overall = {name: np.mean([bits[name][domain] for domain in domains], axis=0) for name in VARIANTS}
    reference = timing["tokens_per_second"]["molm-mi"]
    rows = []
    for name in VARIANTS:
        _, config = setting.variant(name)
        total = results[name][0]["parameters"]
        active = active_parameters(config) if isinstance(config, MoLMConfig) else total
        speed, memory = timing["tokens_per_second"][name], timing["memory_bytes"][name]
        idle = (
            [f"{100 * np.mean([idle_experts(r) for r in results[name]]):.0f} %"] if name.startswith("molm") else ["-"]
        )
        rows.append(
            [
                TITLES[name],
                f"{total / 1e6:.2f}",
                f"{active / 1e6:.2f}",
                *(mean_and_spread(bits[name][domain]) for domain in domains),
                mean_and_spread(list(overall[name])),
                *idle,
                *(f"{speed[what] / reference[what]:.2f}x" for what in ("training", "generation")),
                *("-" if memory[what] is None else f"{memory[what] / 1e6:.0f}" for what in ("training", "generation")),
            ]
        )
    head = ["model", "parameters [M]", "active [M]", *domains, "mean", "idle FFN experts", "training speed"]
    head += ["generation speed", "training MB", "generation MB"]
    size = setting.size
    trained = size.steps * size.batch_size * size.length
    minutes = sum(r["train_seconds"] for found in results.values() for r in found) / 60
    about = (
        f"Held-out bits per byte after {size.steps} steps of {size.batch_size} x {size.length} tokens "
        f"({trained / 1e6:.2f} M tokens), mean of {len(setting.seeds)} seeds ± half their range; windows of "
        f"{size.length} tokens without history. Speeds in tokens per second over those of the first row, "
        f"{timing['threads']} threads, float32, medians of interleaved rounds; memory is what a call takes above the "
        f"weights. Idle: experts with less than a tenth of a fair share of their layer's slots. "
        f"The wall times of all trainings add up to {minutes:.0f} minutes, one thread each."
    )
    write_report(
        setting.results,
        "Language modelling and ablation",
        [about, markdown_table(head, rows), "![Bits per byte](bits_per_byte.png)", *verdicts(overall, results)],
        {"size": vars(size), "seeds": setting.seeds, "bits_per_byte": bits, "timing": timing, "train_minutes": minutes},
    )
    _draw(setting, overall)


def verdicts(overall: dict[str, np.ndarray], results: dict[str, list[Result]]) -> list[str]:
    """What the numbers say about the paper's claims."""

    def clearly_below(a: str, b: str) -> bool:
        return bool(overall[a].max() < overall[b].min())

    def both(a: str, b: str) -> str:
        return f"{overall[a].mean():.3f} against {overall[b].mean():.3f} bits per byte"

    idle = {name: float(np.mean([idle_experts(r) for r in results[name]])) for name in ("molm-mi", "molm-none")}
    return [
        verdict(
            "Modules beat a dense model of equal active size.",
            clearly_below("molm-mi", "dense-active"),
            f"{both('molm-mi', 'dense-active')}.",
        ),
        verdict(
            "A dense model of equal total size is better, at several times the arithmetic.",
            clearly_below("dense-total", "molm-mi"),
            f"dense {both('dense-total', 'molm-mi')}.",
        ),
        verdict(
            "Stick-breaking attention is better than softmax with rotary positions.",
            clearly_below("molm-mi", "molm-rotary"),
            f"{both('molm-mi', 'molm-rotary')} (within the length trained on).",
        ),
        verdict(
            "The mutual-information loss is at least as good as the switch loss.",
            bool(overall["molm-mi"].mean() <= overall["molm-switch"].mean()),
            f"{both('molm-mi', 'molm-switch')}.",
        ),
        verdict(
            "Without a balancing loss experts stay idle and the model is worse.",
            idle["molm-none"] > idle["molm-mi"] and clearly_below("molm-mi", "molm-none"),
            f"{100 * idle['molm-none']:.0f} % of the feed-forward experts idle against {100 * idle['molm-mi']:.0f} %; "
            f"with the loss {both('molm-mi', 'molm-none')} without.",
        ),
    ]


def _draw(setting: Setting, overall: dict[str, Any]) -> None:
    figure, (axis,) = new_figure(width=7.5, height=3.6)
    for i, name in enumerate(reversed(VARIANTS)):
        values = overall[name]
        axis.plot(values, [i] * len(values), "o", color=COLOURS[0 if name == "molm-mi" else 4], alpha=0.6)
        axis.plot(values.mean(), i, "|", color="black", markersize=18)
    axis.set_yticks(range(len(VARIANTS)), [TITLES[name] for name in reversed(VARIANTS)])
    axis.set_xlabel("held-out bits per byte (mean of the domains); a point is a seed")
    axis.grid(axis="x", alpha=0.3)
    save_figure(figure, setting.results / "bits_per_byte.png")


if __name__ == "__main__":
    main()
