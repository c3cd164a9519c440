"""Experiment 5: how little of a model one domain needs (the paper's Figures 3, 4 and 5).

python -m benchmarks.experiments.pruning

A trained model is fine-tuned on one domain, with and without the concentration loss, and then pruned to several sizes;
or pruned by the domain's usage first and then fine-tuned. Against both: leaving whole layers out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from moduleformer_ext.data import TokenStream
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import NORMALISERS, ExpertUsage, count_parameters, plan_by_size, prune

from .cells import Result
from .report import COLOURS, markdown_table, new_figure, save_figure, write_report
from .setting import AUX_WEIGHTS, Setting, make_parser, make_setting, mean_and_spread
from .training import as_tokens, make_reader, score, train, window_losses

BASE = "molm-mi"
CONCENTRATION_WEIGHT = 0.2
USAGE_WINDOWS, LAYER_WINDOWS = 128, 32
"""Of the domain's training text, to count the experts' use and to choose layers on; held-out text only measures."""

SMALL = 0.6
"""Claims are judged where at most so much of the parameters is left."""

PLAIN, CONCENTRATED, PRUNE_FIRST = "fine-tune, prune", "fine-tune with concentration, prune", "prune, fine-tune"
DROP, DROP_FIRST = "fine-tune, drop layers", "drop layers, fine-tune"

Key = tuple[str, str]
"""Method, and how frequencies are normalised ("": layers are dropped)."""
Curve = dict[float, list[float]]
"""Fraction of the parameters that remains -> bits per byte, one number per seed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all curves (training the base models that are missing), write the report."""
    parser = make_parser("pruning", "Bits per byte of one domain against remaining parameters.")
    parser.add_argument("--domain", help="one of the old domains (default: the first)")
    options = parser.parse_args(arguments)
    setting = make_setting("pruning", options)
    domain = options.domain or setting.old.domains[0]
    if domain not in setting.old.domains:
        parser.error(f"--domain: must be one of {', '.join(setting.old.domains)}, got {domain}")
    report(setting, domain, [Subject(setting, domain, seed) for seed in setting.seeds])


@dataclass
class Subject:
    """One seed of the experiment."""

    setting: Setting
    domain: str
    seed: int
    seconds: float = field(default=0.0, init=False)
    """That its cells took, in this call or an earlier one."""

    def load(self, name: str) -> MoLMForCausalLM:
        """A trained model."""
        return cast(MoLMForCausalLM, self.setting.cells.model(name, self.seed))

    def fine_tune(self, name: str, start: Callable[[], MoLMForCausalLM]) -> None:
        """Train what `start` gives on the domain."""
        size = self.setting.size

        def run() -> tuple[MoLMForCausalLM, Result]:
            model = start()
            weights = {**AUX_WEIGHTS, "concentration": CONCENTRATION_WEIGHT}
            reader = make_reader({self.domain: self.training_text}, size.batch_size, size.length, self.seed)
            weight = weights[model.config.aux_loss_type]
            return model, train(model, reader, self.setting.options(later=True, aux_loss_weight=weight, seed=self.seed))

        self.seconds += self.setting.cells.trained(name, self.seed, run)["train_seconds"]

    def measure(self, name: str, models: Callable[[], Iterable[tuple[float, MoLMForCausalLM]]]) -> dict[float, float]:
        """Bits per byte of held-out text, by fraction of the parameters."""

        def run() -> Result:
            start = time.perf_counter()
            streams = {self.domain: self.setting.old.held_out[self.domain]}
            length = self.setting.size.length
            found = [(at, score(model, streams, length)[self.domain].bits_per_byte) for at, model in models()]
            return {"bits_per_byte": found, "seconds": time.perf_counter() - start}

        result = self.setting.cells.measured(f"{name}-scores", self.seed, run)
        self.seconds += result["seconds"]
        return dict(result["bits_per_byte"])

    @property
    def training_text(self) -> TokenStream:
        """Of the domain."""
        return self.setting.old.train[self.domain]

    def pruned(self, name: str, normalise: str, sizes: Sequence[float]) -> Iterator[tuple[float, MoLMForCausalLM]]:
        """A model without the experts that the domain uses least."""
        model, usage, length = self.load(name), ExpertUsage(), self.setting.size.length
        window_losses(model, as_tokens(self.training_text)[: USAGE_WINDOWS * length + 1], length, usage)
        for at in sizes:
            yield at, prune(model, plan_by_size(model.config, usage, at, normalise=normalise))

    def shortened(self, name: str) -> Iterator[tuple[float, MoLMForCausalLM]]:
        """A model without one layer, two, and so on: every time the one that costs the domain least."""
        model, length = self.load(name), self.setting.size.length
        tokens = as_tokens(self.training_text)[: LAYER_WINDOWS * length + 1]
        for at in layer_fractions(self.setting):
            candidates = [without_layer(model, layer) for layer in range(model.config.n_layer)]
            model = min(candidates, key=lambda candidate: window_losses(candidate, tokens, length).mean().item())
            yield at, model


def measure_seed(subject: Subject) -> dict[Key, dict[float, float]]:
    """All curves of one seed; trains and measures what is not there yet."""
    setting = subject.setting
    setting.first_training(BASE, subject.seed)
    curves: dict[Key, dict[float, float]] = {}
    prefix = f"pruning-{subject.domain}"
    for method, loss in ((PLAIN, "mi"), (CONCENTRATED, "concentration")):
        name = f"{prefix}-{loss}"
        subject.fine_tune(name, lambda loss=loss: with_loss(subject.load(BASE), loss))
        whole = subject.measure(name, lambda name=name: [(1.0, subject.load(name))])
        for normalise in NORMALISERS:
            smaller = subject.measure(
                f"{name}-{normalise}",
                lambda name=name, normalise=normalise: subject.pruned(name, normalise, fractions(setting)),
            )
            curves[method, normalise] = {**whole, **smaller}
    tuned = curves[PLAIN, "max"][1.0]
    shorter = subject.measure(f"{prefix}-mi-layers", lambda: subject.shortened(f"{prefix}-mi"))
    curves[DROP, ""] = {1.0: tuned, **shorter}
    layers = layer_fractions(setting)
    same = [at for at in fractions(setting) if at in layers] or fractions(setting)[-1:]
    smaller_first: dict[Key, tuple[list[float], Callable[[], Iterator[tuple[float, MoLMForCausalLM]]]]] = {
        (PRUNE_FIRST, "max"): (same, lambda: subject.pruned(BASE, "max", same)),
        (DROP_FIRST, ""): (layers, lambda: subject.shortened(BASE)),
    }
    for key, (sizes, models) in smaller_first.items():
        curves[key] = {1.0: tuned}
        for at in sizes:
            name = f"{prefix}-{'prune' if key[1] else 'drop'}-{at:.3f}"
            subject.fine_tune(name, lambda at=at, models=models: dict(models())[at])
            curves[key] |= subject.measure(name, lambda name=name, at=at: [(at, subject.load(name))])
    return curves


def with_loss(model: MoLMForCausalLM, loss: str) -> MoLMForCausalLM:
    """The model with another routing loss in its objective."""
    return MoLMForCausalLM.from_state(model.config.replace(aux_loss_type=loss), model.state_dict())


def without_layer(model: MoLMForCausalLM, layer: int) -> MoLMForCausalLM:
    """The model with one layer less; all its layers must have the same numbers of experts."""
    prefix = "transformer.h."
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(prefix):
            state[name] = tensor
            continue
        number, rest = name.removeprefix(prefix).split(".", 1)
        if int(number) != layer:
            state[f"{prefix}{int(number) - (int(number) > layer)}.{rest}"] = tensor
    return MoLMForCausalLM.from_state(model.config.replace(n_layer=model.config.n_layer - 1), state)


def layer_fractions(setting: Setting) -> list[float]:
    """What remains of the parameters without one layer, two, and so on; one layer stays."""
    config = setting.size.molm
    sizes = [count_parameters(config.replace(n_layer=layers)) for layers in range(config.n_layer, 0, -1)]
    return [round(size / sizes[0], 3) for size in sizes[1:]]


def fractions(setting: Setting) -> list[float]:
    """The sizes to prune to: those of whole layers, one before them, and nearly the smallest."""
    config = setting.size.molm
    smallest = count_parameters(config.replace(n_att_experts=config.attention.k, n_mlp_experts=config.ffn.k))
    least = round(smallest / count_parameters(config) + 0.02, 3)
    layers = layer_fractions(setting)
    return sorted({*(at for at in layers if at > least), round((1 + layers[0]) / 2, 3), least}, reverse=True)


def report(setting: Setting, domain: str, subjects: Sequence[Subject]) -> None:
    """Measure; table, picture, verdicts."""
    found = [measure_seed(subject) for subject in subjects]
    curves: dict[Key, Curve] = {
        key: {at: [curve[key][at] for curve in found] for at in sorted(found[0][key], reverse=True)} for key in found[0]
    }
    columns = sorted({at for curve in curves.values() for at in curve}, reverse=True)
    rows = [
        [method, normalise, *(mean_and_spread(curve[at]) if at in curve else "" for at in columns)]
        for (method, normalise), curve in curves.items()
    ]
    size, seconds = setting.size, sum(subject.seconds for subject in subjects)
    about = (
        f"Held-out bits per byte of {domain} against the fraction that remains of "
        f"{count_parameters(size.molm)} parameters; mean of {len(subjects)} seeds ± half their range. The model was "
        f"trained on {' and '.join(setting.old.domains)}; a fine-tuning is {size.later_steps} steps of "
        f"{size.batch_size} x {size.length} tokens of {domain}. Experts to prune are chosen by their frequency, layers "
        f"to drop by the loss without them, both on training text. The concentration loss has the weight "
        f"{CONCENTRATION_WEIGHT:g}. Everything after the first training took {seconds / 60:.0f} minutes."
    )
    draw(setting, curves, domain)
    write_report(
        setting.results,
        "Pruning",
        [
            about,
            markdown_table(["method", "normalised", *(f"{100 * at:.0f} %" for at in columns)], rows),
            "![Bits per byte against remaining parameters](pruning.png)",
            *verdicts(curves),
        ],
        {
            "size": vars(size),
            "seeds": setting.seeds,
            "domain": domain,
            "bits_per_byte": {
                ", ".join(filter(None, key)): {f"{at:.3f}": values for at, values in curve.items()}
                for key, curve in curves.items()
            },
            "seconds": seconds,
        },
    )


def verdicts(curves: Mapping[Key, Curve]) -> list[str]:
    """The paper's claims, size by size below `SMALL`: one shows where it does for every seed."""

    def judge(claim: str, first: Key, second: Key, factor: float = 1.0) -> str:
        sizes = sorted(set(curves[first]) & set(curves[second]), reverse=True)
        found: dict[bool, list[str]] = {True: [], False: []}
        for at in [size for size in sizes if size < SMALL] or sizes[-1:]:
            a, b = np.array(curves[first][at]), np.array(curves[second][at])
            shows = bool((a < factor * b).all())
            found[shows].append(f"at {100 * at:.0f} % ({a.mean():.3f} against {b.mean():.3f})")
        words = {True: "Shows here", False: "Does not show"}
        sentences = [f"{words[shows]} {', '.join(places)}." for shows, places in found.items() if places]
        return " ".join([f"**{claim}**", *sentences])

    plain, concentrated, first = (PLAIN, "max"), (CONCENTRATED, "max"), (PRUNE_FIRST, "max")
    return [
        judge("A model can be pruned further after fine-tuning with concentration than without.", concentrated, plain),
        judge("After fine-tuning with concentration, experts are missed less than layers.", concentrated, (DROP, "")),
        judge("Before fine-tuning too, experts are missed less than layers.", first, (DROP_FIRST, "")),
        judge(
            "Fine-tuned once with concentration and pruned to any size, a model is within 5 % of one that was pruned "
            "to this size and then fine-tuned.",
            concentrated,
            first,
            1.05,
        ),
        judge(
            "Frequencies relative to the layer's maximum prune better than those relative to its sum (with "
            "concentration).",
            concentrated,
            (CONCENTRATED, "sum"),
        ),
    ]


def draw(setting: Setting, curves: Mapping[Key, Curve], domain: str) -> None:
    """Left: the methods; right: the two normalisations."""
    figure, (left, right) = new_figure(2)
    methods = dict(zip((PLAIN, CONCENTRATED, PRUNE_FIRST, DROP, DROP_FIRST), COLOURS, strict=False))
    for (method, normalise), curve in curves.items():
        colour = methods[method]
        at = np.array(sorted(curve))
        values = np.array([curve[x] for x in at])
        for axis, shown in ((left, normalise != "sum"), (right, method in (PLAIN, CONCENTRATED))):
            if shown:
                label = method if axis is left else f"{method}, by {normalise}"
                style = ":" if axis is right and normalise == "sum" else "--" if method in (DROP, DROP_FIRST) else "-"
                axis.plot(100 * at, values.mean(1), style, marker="o", color=colour, label=label, markersize=4)
                axis.fill_between(100 * at, values.min(1), values.max(1), color=colour, alpha=0.15, linewidth=0)
    for axis, title in ((left, "Methods"), (right, "Frequencies normalised by the layer's maximum or its sum")):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("remaining parameters [%]")
        axis.set_ylabel(f"bits per byte of {domain}")
        axis.legend(frameon=False, fontsize=8)
    save_figure(figure, setting.results / "pruning.png")


if __name__ == "__main__":
    main()
