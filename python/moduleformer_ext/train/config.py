"""Everything that defines a training run, from defaults, a file and flags."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from moduleformer_ext.surgery import PARTS, PENALTIES

DTYPES = ("auto", "fp32", "bf16")


def _option(default: Any, text: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Options of a run. Exactly one of `steps` and `minutes` sets its length."""

    text: tuple[str, ...] = _option(
        (), "text files or folders, PATH or DOMAIN=PATH; none: code and prose of the standard library"
    )
    held_out: float = _option(0.05, "fraction of the documents to measure on")
    vocab_size: int = _option(2048, "entries of the byte-level BPE")
    domain_exponent: float = _option(0.5, "batch lanes per domain in proportion to its size to this power")
    preset: str = _option("molm-tiny", "named model configuration to start from")
    model: dict[str, Any] = _option({}, "model configuration fields that replace those of the preset")  # noqa: RUF009
    batch_size: int = _option(4, "lanes read in parallel")
    segment_length: int = _option(512, "new tokens of each lane per step")
    history_length: int = _option(512, "past tokens that these attend to")
    aux_loss_weight: float = _option(0.01, "weight of the routing loss in the objective")
    trainable: str = _option("all", "what trains: all, experts (with their router rows), or new (of new experts only)")
    train_embedding: bool = _option(False, "train the token embedding too, where not everything trains")
    routing_penalty: float = _option(0.0, "weight of the penalty on the routing of new experts")
    routing_penalty_kind: str = _option("norm", "norm (of the new router rows) or share (of the probability)")
    steps: int = _option(0, "optimiser steps (0: as many as fit in --minutes)")
    minutes: float = _option(0.0, "wall-clock budget of the whole run, evaluation included (0: none)")
    learning_rate: float = _option(2e-3, "peak of the schedule")
    warmup: float = _option(0.05, "fraction of the steps with a rising learning rate")
    final_learning_rate: float = _option(0.05, "end of the cosine, as a fraction of the peak")
    weight_decay: float = _option(0.1, "AdamW's decay, on matrices only")
    beta1: float = _option(0.9, "AdamW's decay of the first moment")
    beta2: float = _option(0.98, "AdamW's decay of the second moment")
    clip_norm: float = _option(1.0, "largest global norm of the gradient")
    dtype: str = _option("auto", "fp32, bf16 (autocast), or auto: whichever is measured faster here")
    device: str = _option("cpu", "torch device")
    seed: int = _option(0, "seed of the initial weights and of sampling")
    checkpoint_every: int = _option(100, "steps between checkpoints")
    keep_checkpoints: int = _option(2, "newest checkpoints to keep")
    log_every: int = _option(10, "steps between lines of metrics.jsonl")

    def __post_init__(self) -> None:
        for name in ("vocab_size", "batch_size", "segment_length", "checkpoint_every", "keep_checkpoints"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("log_every", self.log_every >= 1, "at least 1")
        for name in ("steps", "minutes", "weight_decay", "domain_exponent", "history_length", "aux_loss_weight"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("routing_penalty", self.routing_penalty >= 0, "at least 0")
        self._require("trainable", self.trainable in PARTS, f"one of {', '.join(PARTS)}")
        self._require("routing_penalty_kind", self.routing_penalty_kind in PENALTIES, f"one of {', '.join(PENALTIES)}")
        for name in ("learning_rate", "clip_norm"):
            self._require(name, getattr(self, name) > 0, "above 0")
        for name in ("warmup", "final_learning_rate"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("held_out", "beta1", "beta2"):
            self._require(name, 0 < getattr(self, name) < 1, "between 0 and 1 (exclusive)")
        self._require("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        if (self.steps > 0) == (self.minutes > 0):
            raise ValueError(
                f"config: give exactly one of steps and minutes, got steps={self.steps} minutes={self.minutes:g}"
            )

    def _require(self, name: str, condition: bool, expectation: str) -> None:
        if not condition:
            raise ValueError(f"config: {name} must be {expectation}, got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "TrainConfig":
        """Make a config from plain values; unknown names and wrong types are errors."""
        defaults = {option.name: default_of(option) for option in dataclasses.fields(cls)}
        if unknown := sorted(options.keys() - defaults.keys()):
            raise ValueError(f"config: unknown options {', '.join(unknown)}; there are {', '.join(sorted(defaults))}")
        return cls(**{name: _coerce(name, value, defaults[name]) for name, value in options.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {**dataclasses.asdict(self), "text": list(self.text)}


def default_of(option: "dataclasses.Field[Any]") -> Any:
    """Default value of a config field."""
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default


def _coerce(name: str, value: Any, default: Any) -> Any:
    kind = type(default)
    if kind is tuple and isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        expected = "list of strings" if kind is tuple else kind.__name__
        raise ValueError(f"config: {name} must be a {expected}, got {value!r}")
    return value


def read_options(path: Path) -> dict[str, Any]:
    """Read options from a .json or .toml file."""
    if not path.is_file():
        raise FileNotFoundError(f"config: '{path}' does not exist")
    try:
        if path.suffix == ".toml":
            return tomllib.loads(path.read_text())
        options = json.loads(path.read_text())
    except ValueError as error:  # of either parser
        raise ValueError(f"config: '{path}' is not valid {path.suffix or 'JSON'}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"config: '{path}' must hold an object of options, got {type(options).__name__}")
    return options
