"""The size of the experiments, their command line, and the models that several of them share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moduleformer_ext.data import Dataset
from moduleformer_ext.models import ExpertsConfig, MoLMConfig
from moduleformer_ext.surgery import count_parameters
from moduleformer_ext.train.config import TrainConfig

from .baselines import DenseConfig, Model, active_parameters, dense_of_size, dense_of_width
from .cells import Cells, Result, make_model
from .texts import new_dataset, old_dataset
from .training import make_reader, score, train

RESULTS = Path(__file__).parent.parent / "results" / "experiments"
AUX_WEIGHTS = {"mi": 0.05, "switch": 0.01, "none": 0.0}
"""Of the routing losses: the mutual information in nats, and the switch loss with its published weight."""


@dataclass(frozen=True)
class Size:
    """How large the models are and how long they train."""

    n_embd: int = 128
    n_layer: int = 4
    n_att_experts: int = 8
    n_mlp_experts: int = 16
    ffd_hidden: int = 256
    vocab_size: int = 2048
    length: int = 256
    batch_size: int = 8
    steps: int = 500
    later_steps: int = 150
    """Of the fine-tunings and the learning of new text."""
    learning_rate: float = 3e-3
    later_learning_rate: float = 1e-3
    longest: int = 4096
    """Tokens, in the length extrapolation."""

    @property
    def molm(self) -> MoLMConfig:
        """The MoLM of this size, with the mutual-information loss."""
        return MoLMConfig(
            vocab_size=self.vocab_size,
            n_embd=self.n_embd,
            n_layer=self.n_layer,
            n_head=2,
            attention=ExpertsConfig(hidden=self.n_embd, num_experts=self.n_att_experts),
            ffn=ExpertsConfig(hidden=self.ffd_hidden, num_experts=self.n_mlp_experts),
            gating_size=32,
            block_size=self.length,
            history_length=0,
            aux_loss_type="mi",
            aux_loss_weight=AUX_WEIGHTS["mi"],
        )


FULL = Size()
QUICK = Size(
    n_embd=64,
    n_layer=2,
    n_att_experts=4,
    n_mlp_experts=4,
    ffd_hidden=64,
    vocab_size=512,
    length=32,
    batch_size=4,
    steps=6,
    later_steps=3,
    longest=128,
)


@dataclass(frozen=True)
class Setting:
    """One call of one experiment."""

    size: Size
    seeds: tuple[int, ...]
    cells: Cells
    results: Path
    old: Dataset
    new: Dataset | None

    def variant(self, name: str) -> tuple[str, MoLMConfig | DenseConfig]:
        """Kind and description of a model of the ablation (`VARIANTS`)."""
        molm = self.size.molm
        if name == "dense-active":
            # No router: what it has goes to the feed-forward layer.
            return "dense", dense_of_width(molm, molm.n_embd, active_parameters(molm))
        if name == "dense-total":
            return "dense", dense_of_size(molm, count_parameters(molm))
        kind = "rotary" if name == "molm-rotary" else "molm"
        loss = name.removeprefix("molm-") if kind == "molm" else "mi"
        return kind, molm.replace(aux_loss_type=loss, aux_loss_weight=AUX_WEIGHTS[loss])

    def options(self, *, later: bool = False, **changes: Any) -> TrainConfig:
        """Of the first training, or of a later one on a trained model."""
        size = self.size
        fields: dict[str, Any] = {
            "steps": size.later_steps if later else size.steps,
            "learning_rate": size.later_learning_rate if later else size.learning_rate,
            "batch_size": size.batch_size,
            "segment_length": size.length,
        }
        return TrainConfig(**{**fields, **changes})

    def first_training(self, name: str, seed: int) -> Result:
        """Train a variant on the old domains, if that is not done yet; scores on their held-out text."""

        def run() -> tuple[Model, Result]:
            kind, config = self.variant(name)
            torch.manual_seed(seed)
            model = make_model(kind, config)
            reader = make_reader(self.old.train, self.size.batch_size, self.size.length, seed)
            weight = config.aux_loss_weight if isinstance(config, MoLMConfig) else 0.0
            # Wider models want smaller steps: at MoLM's own rate the widest dense one is worse than the narrowest.
            rate = self.size.learning_rate * self.size.n_embd / config.n_embd
            result = train(model, reader, self.options(aux_loss_weight=weight, learning_rate=rate, seed=seed))
            scores = score(model, self.old.held_out, self.size.length)
            return model, {
                **result,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "tokens": self.size.steps * self.size.batch_size * self.size.length,
                "bits_per_byte": {domain: found.bits_per_byte for domain, found in scores.items()},
                "usage": {domain: found.usage.to_dict() for domain, found in scores.items()},
            }

        return self.cells.trained(name, seed, run)


VARIANTS = ("molm-mi", "molm-none", "molm-switch", "molm-rotary", "dense-active", "dense-total")


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options that all experiments have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.experiments.{name}", description=description)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="folder of texts and trained models")
    parser.add_argument("--results", type=Path, help="folder of table and pictures (default: among the results)")
    parser.add_argument("--quick", action="store_true", help="tiny models and a few steps, to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--text", nargs="+", default=[], metavar="DOMAIN=PATH", help="the user's own old domains")
    parser.add_argument("--new-text", nargs="+", default=[], metavar="DOMAIN=PATH", help="the user's own new domains")
    return parser


def make_setting(name: str, options: argparse.Namespace, *, needs_new_text: bool = False) -> Setting:
    """Read texts and prepare folders."""
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else FULL
    out = options.out / "quick" if options.quick else options.out
    results = options.results or (out / "results" / name if options.quick else RESULTS / name)
    results.mkdir(parents=True, exist_ok=True)
    old = old_dataset(out, options.text, size.vocab_size)
    new = new_dataset(out, options.new_text, old) if needs_new_text else None
    return Setting(size, tuple(options.seeds), Cells(out / "cells"), results, old, new)


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and, of several values, half the range."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"
