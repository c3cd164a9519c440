"""Experiment 4: learning a new language, and what of the old domains is left (the paper's Tables 5, 6 and 9).

python -m benchmarks.experiments.continual

Joint: old and new text together. Lifelong: new text alone, by training everything, low-rank adapters (LoRA) of the
dense model, or new experts of MoLM under routing penalties of several weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from moduleformer_ext.data import LaneReader, TokenStream
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import ExpertUsage, insert_experts, set_trainable

from .baselines import Model
from .cells import Result
from .report import COLOURS, markdown_table, new_figure, save_figure, verdict, write_report
from .setting import AUX_WEIGHTS, Setting, make_parser, make_setting, mean_and_spread
from .training import as_tokens, make_reader, score, train, window_losses

MOLM, DENSE = "molm-mi", "dense-active"
TITLES = {MOLM: "MoLM", DENSE: "dense"}
USAGE_WINDOWS = 64
"""Of the new training text, to find the experts to copy."""


@dataclass(frozen=True)
class Method:
    """One way to learn the new text."""

    base: str
    how: str
    joint: bool = False
    lora_rank: int = 0
    new_experts: bool = False
    penalty: float = 0.0
    penalty_kind: str = "norm"
    rate: float = 1.0
    """Learning rate, as a multiple of that with which everything trains."""

    @property
    def name(self) -> str:
        """In the table."""
        return f"{TITLES[self.base]}, {self.how}"

    @property
    def key(self) -> str:
        """In names of cells."""
        return self.name.replace(",", "").replace(" ", "-")


METHODS = (
    Method(MOLM, "joint", joint=True),
    Method(DENSE, "joint", joint=True),
    Method(MOLM, "everything"),
    Method(DENSE, "everything"),
    Method(DENSE, "LoRA of rank 8", lora_rank=8, rate=3),
    Method(DENSE, "LoRA of rank 64", lora_rank=64, rate=3),
    Method(DENSE, "LoRA of rank 64, 10x rate", lora_rank=64, rate=10),
    Method(MOLM, "new experts", new_experts=True, rate=3),
    Method(MOLM, "new experts, norm 0.03", new_experts=True, penalty=0.03, rate=3),
    Method(MOLM, "new experts, norm 0.3", new_experts=True, penalty=0.3, rate=3),
    Method(MOLM, "new experts, norm 1", new_experts=True, penalty=1.0, rate=3),
    Method(MOLM, "new experts, share 0.1", new_experts=True, penalty=0.1, penalty_kind="share", rate=3),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all methods (training the base models that are missing), write the report."""
    parser = make_parser("continual", "A new language: what is learned, what is forgotten.")
    parser.add_argument("--language", help="one of the new domains (default: the first)")
    options = parser.parse_args(arguments)
    setting = make_setting("continual", options, needs_new_text=True)
    assert setting.new is not None
    language = options.language or setting.new.domains[0]
    if language not in setting.new.domains:
        parser.error(f"--language: must be one of {', '.join(setting.new.domains)}, got {language}")
    report(setting, language, {seed: measure_seed(setting, language, seed) for seed in setting.seeds})


def measure_seed(setting: Setting, language: str, seed: int) -> dict[str, Result]:
    """By method, or by base model before anything: bits per byte of "old" and "new", and what it took."""
    found = {}
    for name in (MOLM, DENSE):
        setting.first_training(name, seed)
        found[name] = setting.cells.measured(
            f"continual-{language}-{name}",
            seed,
            lambda name=name: {"bits_per_byte": measure(setting, language, setting.cells.model(name, seed))},
        )
    for method in METHODS:
        found[method.name] = setting.cells.measured(
            f"continual-{language}-{method.key}", seed, lambda method=method: learn(setting, language, method, seed)
        )
    return found


def learn(setting: Setting, language: str, method: Method, seed: int) -> Result:
    """Train the base model by the method; scores afterwards."""
    assert setting.new is not None
    text = {language: setting.new.train[language]}
    model = setting.cells.model(method.base, seed)
    changes: dict[str, Any] = {
        "aux_loss_weight": AUX_WEIGHTS["mi"],
        "learning_rate": method.rate * setting.size.later_learning_rate,
    }
    if method.new_experts:
        model = with_new_experts(setting, cast(MoLMForCausalLM, model), text[language], seed)
        changes |= {"aux_loss_weight": 0.0, "trainable": "new", "routing_penalty": method.penalty}
        changes["routing_penalty_kind"] = method.penalty_kind
        set_trainable(model, "new")
    if method.lora_rank:
        add_lora(model, method.lora_rank, seed)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    reader = reader_of(setting, text, seed, joint=method.joint)
    result = train(model, reader, setting.options(later=True, seed=seed, **changes))
    return {**result, "trainable": trainable, "bits_per_byte": measure(setting, language, model)}


def reader_of(setting: Setting, text: Mapping[str, TokenStream], seed: int, *, joint: bool) -> LaneReader:
    """Batches of the new text, or half of the old domains'."""
    size = setting.size
    if not joint:
        return make_reader(text, size.batch_size, size.length, seed)
    old = setting.old.train
    half = size.batch_size // 2
    lanes = {domain: half // len(old) + (i < half % len(old)) for i, domain in enumerate(old)}
    streams = {name: stream.tokens for name, stream in {**old, **text}.items()}
    reader = LaneReader(streams, {**lanes, **dict.fromkeys(text, size.batch_size - half)}, size.length)
    reader.position = 1009 * seed
    return reader


def with_new_experts(setting: Setting, model: MoLMForCausalLM, text: TokenStream, seed: int) -> MoLMForCausalLM:
    """A quarter more experts in every layer, copies of those that the new text uses most."""
    usage, length = ExpertUsage(), setting.size.length
    window_losses(model, as_tokens(text)[: USAGE_WINDOWS * length + 1], length, usage)
    numbers = {"attention": setting.size.n_att_experts // 4, "ffn": setting.size.n_mlp_experts // 4}
    return insert_experts(model, **numbers, init="copy", usage=usage, seed=seed)


def add_lora(model: nn.Module, rank: int, seed: int) -> None:
    """Low-rank adapters beside all matrices of the dense model's blocks; the rest is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["qkv", "out", "up", "down"])
    inject_adapter_in_model(config, model)


def measure(setting: Setting, language: str, model: Model) -> dict[str, float]:
    """Held-out bits per byte of all old domains together, and of the new one."""
    assert setting.new is not None
    length = setting.size.length

    def overall(streams: Mapping[str, TokenStream]) -> float:
        scores = score(model, streams, length)
        bits = sum(found.bits_per_byte * streams[domain].num_bytes for domain, found in scores.items())
        return bits / sum(stream.num_bytes for stream in streams.values())

    return {"old": overall(setting.old.held_out), "new": overall({language: setting.new.held_out[language]})}


def report(setting: Setting, language: str, found: Mapping[int, Mapping[str, Result]]) -> None:
    """Table, picture, verdicts."""
    seeds = list(found.values())
    old, new = (
        {name: np.array([seed[name]["bits_per_byte"][of] for seed in seeds]) for name in seeds[0]}
        for of in ("old", "new")
    )
    forgotten = {method.name: old[method.name] - old[method.base] for method in METHODS}
    rows = [
        [
            f"{TITLES[name]}, before",
            "",
            mean_and_spread(old[name]),
            "",
            mean_and_spread(new[name]),
        ]
        for name in (MOLM, DENSE)
    ]
    rows += [
        [
            method.name,
            f"{seeds[0][method.name]['trainable']:,}",
            mean_and_spread(old[method.name]),
            f"{forgotten[method.name].mean():+.3f}",
            mean_and_spread(new[method.name]),
        ]
        for method in METHODS
    ]
    size = setting.size
    minutes = sum(seed[method.name]["train_seconds"] for seed in seeds for method in METHODS) / 60
    domains = " and ".join(setting.old.domains)
    about = (
        f"Held-out bits per byte of {domains} (old) and of {language} (new) after {size.later_steps} steps of "
        f"{size.batch_size} x {size.length} tokens on models that know the old domains; mean of {len(seeds)} seeds ± "
        f"half their range. Joint: half of every batch is old text; the other rows see {language} alone. The dense "
        "model has as many parameters as MoLM uses for a token. New experts, a quarter more in every layer, start as "
        f"copies of those that {language} uses most. They train with 3 times the learning rate of everything, and so "
        "does LoRA where no rate is named. Norm and share: the routing penalty and its weight. Training all rows took "
        f"{minutes:.0f} minutes."
    )
    head = ["method", "trainable parameters", domains, "change", language]
    draw(setting, language, forgotten, new)
    write_report(
        setting.results,
        f"Continual learning: {language}",
        [
            about,
            markdown_table(head, rows),
            "![What is learned against what is forgotten](continual.png)",
            *verdicts(forgotten, new, language),
        ],
        {
            "size": vars(size),
            "seeds": setting.seeds,
            "language": language,
            "bits_per_byte": {name: {"old": old[name].tolist(), "new": new[name].tolist()} for name in old},
            "trainable": {method.name: seeds[0][method.name]["trainable"] for method in METHODS},
            "train_seconds": {m.name: [seed[m.name]["train_seconds"] for seed in seeds] for m in METHODS},
        },
    )


def verdicts(forgotten: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], language: str) -> list[str]:
    """The paper's claims."""
    inserted = [method.name for method in METHODS if method.new_experts and method.penalty_kind == "norm"]
    lora = [method.name for method in METHODS if method.lora_rank]
    free, held = inserted[0], inserted[-1]

    def pair(first: str, second: str, values: Mapping[str, np.ndarray], sign: str = "") -> str:
        return f"{values[first].mean():{sign}.3f} against {values[second].mean():{sign}.3f}"

    everything = "MoLM, everything", "dense, everything"
    best_lora = min(lora, key=lambda name: new[name].mean())
    rivals = [name for name in inserted if new[name].mean() <= new[best_lora].mean()]
    rival = min(rivals, key=lambda name: forgotten[name].mean(), default=min(inserted, key=lambda n: new[n].mean()))
    return [
        verdict(
            "Trained as a whole on new text alone, MoLM forgets less than a dense model.",
            bool((forgotten[everything[0]] < forgotten[everything[1]]).all()),
            f"{pair(*everything, forgotten, '+')} bits per byte of old text, {language} at {pair(*everything, new)}.",
        ),
        verdict(
            "New experts learn as much as LoRA does and forget less.",
            bool(rivals) and bool((forgotten[rival] < forgotten[best_lora]).all()),
            f"{rival}, and {best_lora}: {pair(rival, best_lora, forgotten, '+')} bits per byte of old text, {language} "
            f"at {pair(rival, best_lora, new)}.",
        ),
        verdict(
            "Routing regularisation trades new text for old: the heavier, the less is forgotten and learned.",
            bool((forgotten[held] < forgotten[free]).all() and (new[held] > new[free]).all()),
            f"{held}, and without it: {pair(held, free, forgotten, '+')} bits per byte of old text, {language} at "
            f"{pair(held, free, new)}.",
        ),
        verdict(
            "Joint training forgets next to nothing (under 0.05 bits per byte).",
            bool(max(forgotten["MoLM, joint"].mean(), forgotten["dense, joint"].mean()) < 0.05),
            f"{pair('MoLM, joint', 'dense, joint', forgotten, '+')} bits per byte, MoLM and dense.",
        ),
    ]


def draw(setting: Setting, language: str, forgotten: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> None:
    """A point per method: what it learned (left is better) and what it forgot (low is better)."""
    figure, (axis,) = new_figure(width=7.5, height=5.0)
    colours = dict(zip(TITLES, COLOURS, strict=False))
    for method in METHODS:
        x, y = new[method.name], forgotten[method.name]
        marker = "D" if method.new_experts else "^" if method.lora_rank else "s" if method.joint else "o"
        colour = colours[method.base]
        spread = {
            "xerr": [[x.mean() - x.min()], [x.max() - x.mean()]],
            "yerr": [[y.mean() - y.min()], [y.max() - y.mean()]],
        }
        axis.errorbar(x.mean(), y.mean(), **spread, fmt=marker, color=colour, markersize=6, linewidth=0.8)
        axis.annotate(
            method.how, (x.mean(), y.mean()), xytext=(6, 4), textcoords="offset points", fontsize=8, color=colour
        )
    path = [method.name for method in METHODS if method.new_experts and method.penalty_kind == "norm"]
    axis.plot([new[n].mean() for n in path], [forgotten[n].mean() for n in path], color=colours[MOLM], linewidth=0.8)
    for name, colour in colours.items():
        axis.plot([], [], "o", color=colour, label=TITLES[name])
    axis.axhline(0, color="0.7", linewidth=0.8)
    axis.margins(x=0.2, y=0.1)
    axis.set_xlabel(f"bits per byte of {language} (less is better)")
    axis.set_ylabel(f"change in bits per byte of {' and '.join(setting.old.domains)}")
    axis.legend(frameon=False)
    save_figure(figure, setting.results / "continual.png")


if __name__ == "__main__":
    main()
