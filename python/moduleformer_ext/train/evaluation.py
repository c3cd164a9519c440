"""Held-out measures: bits per byte, perplexity, expert usage; every token is scored once, with its true past."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moduleformer_ext.data import TokenStream
from moduleformer_ext.data.stream import TokenArray
from moduleformer_ext.distributed import ALONE, Processes
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.nn import EvaluationMode
from moduleformer_ext.surgery import ExpertUsage
from moduleformer_ext.train.precision import autocast


@dataclass
class Score:
    """What a model needed for some text: total bits, over `num_tokens` predictions of `num_bytes` bytes."""

    bits: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0
    usage: ExpertUsage = field(default_factory=ExpertUsage)

    @property
    def bits_per_byte(self) -> float:
        """Bits over the bytes of the text itself."""
        return self.bits / self.num_bytes

    @property
    def perplexity(self) -> float:
        """Per token: 2 ** (bits / tokens); infinite where that is more than a float holds."""
        try:
            return float(2.0 ** (self.bits / self.num_tokens))
        except OverflowError:
            return math.inf


def overall_bits_per_byte(scores: Mapping[str, Score]) -> float:
    """Bits per byte of all domains together."""
    return sum(score.bits for score in scores.values()) / sum(score.num_bytes for score in scores.values())


def evaluate(
    model: MoLMForCausalLM,
    streams: Mapping[str, TokenStream],
    *,
    batch_size: int = 8,
    segment_length: int = 512,
    dtype: str = "fp32",
    advance: Callable[[int], None] = lambda _: None,
    processes: Processes = ALONE,
) -> dict[str, Score]:
    """Score every domain's stream and count its expert activations on the way.

    A stream is read by up to `batch_size` lanes of consecutive segments, the history of the segments before being
    carried along as in training; a lane's first segment has none. `advance` is told of tokens as they are scored, by
    this one of several processes, which share the lanes.

    Raises:
        ValueError: `batch_size` or `segment_length` is below 1.
        FloatingPointError: the loss is not a number.
    """
    for name, value in (("batch_size", batch_size), ("segment_length", segment_length)):
        if value < 1:
            raise ValueError(f"evaluate: {name} must be at least 1, got {value}")
    device = next(model.parameters()).device
    scores = {}
    with EvaluationMode(model):
        for domain, stream in streams.items():
            scores[domain] = score = Score(num_tokens=stream.num_scored, num_bytes=stream.num_bytes)
            with torch.no_grad(), autocast(device, dtype):
                for lanes in _split_lanes(stream.tokens, batch_size, segment_length):
                    own = lanes.tensor_split(processes.size)[processes.rank]  # may be none: all call the model alike
                    _score_lanes(model, own.to(device), segment_length, score, advance)
            score.bits, score.usage = processes.total([score.bits])[0], total_usage(score.usage, processes)
            if math.isnan(score.bits):
                raise FloatingPointError(f"evaluate: the loss on domain '{domain}' must be a number, got nan")
    return scores


def total_usage(usage: ExpertUsage, processes: Processes) -> ExpertUsage:
    """The expert activations of all processes."""
    counts = iter(processes.total([float(n) for layers in usage.counts.values() for layer in layers for n in layer]))
    taken = {k: [[int(next(counts)) for _ in layer] for layer in layers] for k, layers in usage.counts.items()}
    return ExpertUsage.from_dict(taken)


def _split_lanes(tokens: TokenArray, batch_size: int, segment_length: int) -> Iterator[Tensor]:
    """Cut tokens [N] into lanes [B, n + 1] that overlap by one: all tokens but the first are scored once.

    What the division leaves over forms a last lane by itself, so that no lane needs padding, which the routers
    would count.
    """
    scored = len(tokens) - 1
    lanes = max(1, min(batch_size, scored // segment_length))
    length = scored // lanes
    for starts, size in ((range(0, lanes * length, length), length), ([lanes * length], scored % lanes)):
        if size:
            rows = np.stack([tokens[start : start + size + 1] for start in starts])
            yield torch.from_numpy(rows.astype(np.int64))


def _score_lanes(
    model: MoLMForCausalLM, lanes: Tensor, segment_length: int, score: Score, advance: Callable[[int], None]
) -> None:
    history = None
    for start in range(0, lanes.shape[1] - 1, segment_length):
        block = lanes[:, start : start + segment_length + 1]
        inputs, targets = block[:, :-1], block[:, 1:]
        output = model(
            inputs,
            past_key_values=history,
            use_cache=True,
            shift_labels=targets,
            skip_logits=True,
            output_routes=True,
        )
        history = output.past_key_values.last(model.config.history_length)
        if len(targets):  # the mean over nothing is not a number
            score.bits += output.cross_entropy.item() * targets.numel() / math.log(2.0)
        score.usage.add(output.routes)
        advance(targets.numel())
