"""Training and scoring, alike for every model: no history, segments of one length, equal data and steps."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from moduleformer_ext.data import LaneReader, TokenStream, share_lanes
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import ExpertUsage, routing_penalty, set_trainable
from moduleformer_ext.train.config import TrainConfig
from moduleformer_ext.train.optimizer import build_optimizer, learning_rate

from .baselines import Model

LANE_EXPONENT = 0.5
"""Lanes of a batch per domain, in proportion to its size to this power."""


def make_reader(streams: Mapping[str, TokenStream], batch_size: int, length: int, seed: int) -> LaneReader:
    """Batches of all domains; the seed decides where in the text they start."""
    lanes = share_lanes({name: stream.num_scored for name, stream in streams.items()}, batch_size, LANE_EXPONENT)
    reader = LaneReader({name: stream.tokens for name, stream in streams.items()}, lanes, length)
    reader.position = 1009 * seed
    return reader


def train(model: Model, reader: LaneReader, config: TrainConfig) -> dict[str, float]:
    """Take ``config.steps`` steps; returns the last training loss (nats per token, smoothed), and the seconds."""
    if isinstance(model, MoLMForCausalLM):
        set_trainable(model, config.trainable, embedding=config.train_embedding)
    model.train()
    optimizer = build_optimizer(model, config)
    smoothed = math.nan
    start = time.perf_counter()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, config.steps)
        inputs, targets = reader.next()
        loss, objective = _objective(model, inputs, targets, config)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        smoothed = loss if math.isnan(smoothed) else 0.98 * smoothed + 0.02 * loss
    model.eval()
    return {"train_loss": smoothed, "train_seconds": time.perf_counter() - start}


def _objective(model: Model, inputs: Tensor, targets: Tensor, config: TrainConfig) -> tuple[float, Tensor]:
    if not isinstance(model, MoLMForCausalLM):
        loss = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
        return loss.item(), loss
    output = model(inputs, output_routes=True)
    loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    objective = loss
    if config.aux_loss_weight:
        objective = objective + config.aux_loss_weight * output.aux_loss
    if config.routing_penalty:
        assert output.routes is not None
        penalty = routing_penalty(model, output.routes, config.routing_penalty_kind)
        objective = objective + config.routing_penalty * penalty
    return loss.item(), objective


@dataclass
class Score:
    """Of one stream."""

    bits_per_byte: float
    usage: ExpertUsage = field(default_factory=ExpertUsage)


@torch.no_grad()
def window_losses(model: Model, tokens: Tensor, length: int, usage: ExpertUsage | None = None) -> Tensor:
    """Loss in nats of every token but the first of tokens [N], [N - 1], each read in its window of ``length``.

    Windows do not overlap; a token sees those before it in its window. ``usage`` collects the experts' slots.
    """
    model.eval()
    scored = len(tokens) - 1
    whole = scored // length
    losses = []
    at_once = max(1, 4096 // length)
    for first in range(0, whole, at_once):
        count = min(at_once, whole - first)
        begin = first * length
        inputs = tokens[begin : begin + count * length].view(count, length)
        losses.append(_losses(model, inputs, tokens[begin + 1 : begin + count * length + 1], usage))
    if scored % length:
        losses.append(_losses(model, tokens[None, whole * length : -1], tokens[whole * length + 1 :], usage))
    return torch.cat(losses)


def _losses(model: Model, inputs: Tensor, targets: Tensor, usage: ExpertUsage | None) -> Tensor:
    if usage is not None and isinstance(model, MoLMForCausalLM):
        output = model(inputs, output_routes=True)
        usage.add(output.routes or [])
    else:
        output = model(inputs)
    return F.cross_entropy(output.logits.flatten(0, 1), targets, reduction="none")


def as_tokens(stream: TokenStream) -> Tensor:
    """The stream as int64 [N]."""
    return torch.from_numpy(stream.tokens.astype("int64"))


def score(model: Model, streams: Mapping[str, TokenStream], length: int) -> dict[str, Score]:
    """Bits per byte and expert usage on every domain."""
    scores = {}
    for domain, stream in streams.items():
        usage = ExpertUsage()
        losses = window_losses(model, as_tokens(stream), length, usage)
        scores[domain] = Score(losses.double().sum().item() / math.log(2) / stream.num_bytes, usage)
    return scores
