"""Everything that defines a training run, from defaults, a file and flags."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from moduleformer_ext.data import FIELD, check_source
from moduleformer_ext.files import parse_json, read_text
from moduleformer_ext.models import MoLMConfig
from moduleformer_ext.records import (
    Count,
    Fraction,
    InnerFraction,
    Lanes,
    Natural,
    NonNegative,
    Positive,
    Record,
    Seed,
    Text,
)

Sources = tuple[Annotated[Text, AfterValidator(check_source)], ...]


class RunOptions(Record):
    """What flags and files say of a run alike."""

    text: Sources = ()
    """files or folders with text, PATH or DOMAIN=PATH; none: code and prose of the standard library"""
    text_field: Text = FIELD
    """field with the text in records of JSON lines, Parquet and Arrow"""
    held_out: InnerFraction = 0.05
    """fraction of the documents to measure on"""
    vocab_size: Annotated[int, Field(ge=257, le=2**20)] = 2048
    """entries of the byte-level BPE"""
    tokenizer: Text | None = None
    """a tokenizer.json, or a folder with one or with vocab.json and merges.txt, in place of a new one"""
    domain_exponent: Annotated[float, Field(ge=0, le=10)] = 0.5
    """batch lanes per domain in proportion to its size to this power"""
    preset: Text = "molm-tiny"
    """named model configuration to start from"""
    batch_size: Lanes = 4
    """lanes read in parallel"""
    segment_length: Count = 512
    """new tokens of each lane per step"""
    history_length: Natural = 512
    """past tokens that these attend to"""
    aux_loss_weight: NonNegative = 0.01
    """weight of the routing loss in the objective"""
    trainable: Literal["all", "experts", "new"] = "all"
    """what trains: all, experts (with their router rows), or new (of new experts only)"""
    train_embedding: bool = False
    """train the token embedding too, where not everything trains"""
    routing_penalty: NonNegative = 0.0
    """weight of the penalty on the routing of new experts"""
    routing_penalty_kind: Literal["norm", "share"] = "norm"
    """norm (of the new router rows) or share (of the probability)"""
    routing_loss_over: Literal["batch", "process"] = "batch"
    """the tokens that the routing loss is taken over, where several processes share a batch: all, or each its own"""
    micro_batches: Lanes = 1
    """parts in which a process takes its lanes, one after the other, adding up gradients"""
    activation_checkpointing: bool = False
    """recompute each layer in the backward pass instead of keeping its activations"""
    compile: bool = False
    """torch.compile the attention and the experts of each layer"""
    gather_dtype: Literal["fp32", "bf16"] = "fp32"
    """type in which several processes send one another weights; bf16 is half as much, and rounds norms and routers"""
    reshard: bool = True
    """of several processes: free the weights of a layer between its forward and backward pass, and gather them again"""
    expert_parallel: Count = 1
    """of several processes: this many next to one another hold different experts, to which tokens are sent"""
    background_checkpoints: bool = False
    """of several processes: write checkpoints while training goes on"""
    steps: Natural = 0
    """optimiser steps (0: as many as fit in --minutes)"""
    minutes: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    """wall-clock budget of the whole run, evaluation included (0: none)"""
    learning_rate: Positive = 2e-3
    """peak of the schedule"""
    warmup: Fraction = 0.05
    """fraction of the steps with a rising learning rate"""
    final_learning_rate: Fraction = 0.05
    """end of the cosine, as a fraction of the peak"""
    weight_decay: NonNegative = 0.1
    """AdamW's decay, on matrices only"""
    beta1: InnerFraction = 0.9
    """AdamW's decay of the first moment"""
    beta2: InnerFraction = 0.98
    """AdamW's decay of the second moment"""
    clip_norm: Positive = 1.0
    """largest global norm of the gradient"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32, bf16 (autocast), or auto: whichever is measured faster here"""
    device: Text = "cpu"
    """torch device"""
    seed: Seed = 0
    """seed of the initial weights and of sampling"""
    checkpoint_every: Count = 100
    """steps between checkpoints"""
    keep_checkpoints: Count = 2
    """newest checkpoints to keep"""
    log_every: Count = 10
    """steps between lines of metrics.jsonl"""
    log: tuple[Literal["tensorboard"], ...] = ()
    """also write the figures of metrics.jsonl for TensorBoard"""


class FileOptions(RunOptions):
    """What a file says of a run, with flags to come over it."""

    model: dict[str, Any] = Field(default_factory=dict)
    """model configuration fields that replace those of the preset"""


class TrainConfig(FileOptions):
    """Options of a run. Exactly one of `steps` and `minutes` sets its length."""

    @model_validator(mode="after")
    def _check_length(self) -> "TrainConfig":
        if (self.steps > 0) == (self.minutes > 0):
            raise ValueError(
                f"exactly one of steps and minutes must be above 0, got steps={self.steps} minutes={self.minutes:g}"
            )
        return self

    def architecture(self, vocab_size: int, eos_token_id: int = 0) -> MoLMConfig:
        """The model of a run that starts from random weights."""
        if "vocab_size" in self.model:
            raise ValueError(
                "model: vocab_size must be left out, it is that of the tokenizer (--vocab-size, --tokenizer)"
            )
        fields = {
            "block_size": self.segment_length,
            "history_length": self.history_length,
            "aux_loss_weight": self.aux_loss_weight,
            "eos_token_id": eos_token_id,
            **self.model,
            "vocab_size": vocab_size,
        }
        config = MoLMConfig.preset(self.preset, **fields)
        config.require_whole_experts("model")
        return config

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "TrainConfig":
        """Make a config from plain values, as JSON has them; unknown names and wrong types are errors."""
        return parse_json(json.dumps(dict(options)), cls, "config")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return self.model_dump(mode="json")


def read_options(path: Path) -> dict[str, Any]:
    """Read options from a .json or .toml file."""
    if not path.is_file():
        raise FileNotFoundError(f"config: '{path}' does not exist")
    text = read_text(path)
    if path.suffix == ".toml":
        try:
            text = json.dumps(tomllib.loads(text), default=str)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"'{path}': is not valid TOML: {error}") from error
    return parse_json(text, FileOptions, f"'{path}'").model_dump(mode="json", exclude_unset=True)
