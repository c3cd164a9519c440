"""New experts for new knowledge: a model with more experts per layer, its router extended by a new matrix.

With the router's rows A and its hidden vector h(x), the published routing p(m | x) = softmax(A h(x)) becomes

    p(m | x) = softmax([A; A'] h(x))                                            (ModuleFormer, eq. 9)

where A' has one row for every new expert. :func:`moduleformer_ext.surgery.set_trainable` then lets A' and the new
experts train alone, and :func:`moduleformer_ext.surgery.routing_penalty` keeps them from taking over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.models.state import canonical_state
from moduleformer_ext.surgery.anatomy import ATTENTION, FFN, KINDS, Site, sites
from moduleformer_ext.surgery.prune import per_layer
from moduleformer_ext.surgery.usage import ExpertUsage

INITS = ("random", "copy")
_ROW_NOISE = 0.1
"""Relative: a copied row that is not disturbed would tie with its original in every token."""

NumNew = int | Sequence[int]


@torch.no_grad()
def insert_experts(
    model: MoLMForCausalLM,
    *,
    attention: NumNew = 0,
    ffn: NumNew = 0,
    init: str = "random",
    usage: ExpertUsage | None = None,
    seed: int = 0,
) -> MoLMForCausalLM:
    """The model with new experts after those of every layer, in evaluation mode; the given one is left as it is.

    The experts of an earlier insertion count as old from now on.

    Args:
        attention, ffn: how many new experts of each kind, one number or one per layer.
        init: ``"random"`` draws experts and router rows as for a new model. ``"copy"`` copies both from experts of the
            layer, the rows slightly disturbed.
        usage: with ``"copy"``, the most used experts are copied instead of random ones.
        seed: of all that is random.

    Raises:
        ValueError: numbers that are negative, all 0 or not one per layer; an unknown ``init``; another model's usage.
    """
    config = model.config
    config.require_whole_experts("insert_experts")
    numbers = {ATTENTION: _numbers(config, "attention", attention), FFN: _numbers(config, "ffn", ffn)}
    if not any(map(any, numbers.values())):
        raise ValueError("insert_experts: attention or ffn must be above 0, got 0 for both")
    if init not in INITS:
        raise ValueError(f"insert_experts: init must be one of {', '.join(INITS)}, got {init!r}")
    if usage is not None:
        if init != "copy":
            raise ValueError(f"insert_experts: usage must be None with init {init!r}, got counts")
        usage.check_fits(config)

    generator = torch.Generator().manual_seed(seed)
    state = canonical_state(model)
    for site in sites(config):
        if num_new := numbers[site.kind][site.layer]:
            names = (*site.matrices, site.rows(config))
            if init == "copy":
                sources = _sources(site, config, num_new, usage, generator)
                new = [state[name][sources.to(state[name].device)] for name in names]
                new[-1] = _disturbed(new[-1], generator)
            else:
                new = [_drawn(config, name, state[name], num_new, generator) for name in names]
            for name, tensor in zip(names, new, strict=True):
                state[name] = torch.cat([state[name], tensor])
    return MoLMForCausalLM.from_state(_extended(config, numbers), state)


def _numbers(config: MoLMConfig, name: str, value: NumNew) -> tuple[int, ...]:
    numbers = (value,) * config.n_layer if isinstance(value, int) else tuple(value)
    if len(numbers) != config.n_layer or any(number < 0 for number in numbers):
        raise ValueError(
            f"insert_experts: {name} must be one number or one per layer ({config.n_layer}), at least 0, got {value!r}"
        )
    return numbers


def _extended(config: MoLMConfig, numbers: dict[str, tuple[int, ...]]) -> MoLMConfig:
    changes: dict[str, Any] = {}
    for kind in KINDS:
        layers = [Site(kind, layer) for layer in range(config.n_layer)]
        before = [site.num_experts(config) for site in layers]
        after = [n + new for n, new in zip(before, numbers[kind], strict=True)]
        changes[kind] = dataclasses.replace(
            getattr(config, kind),
            num_experts=per_layer(after),
            num_new=per_layer(numbers[kind]),
            places=tuple(
                (*site.places(config), *range(n, end)) for site, n, end in zip(layers, before, after, strict=True)
            ),
        )
    return config.replace(**changes)


def _sources(
    site: Site, config: MoLMConfig, num_new: int, usage: ExpertUsage | None, generator: torch.Generator
) -> Tensor:
    """Places of the experts to copy: the most used ones, or random ones; each again only after all the others."""
    num_experts = site.num_experts(config)
    if usage is None:
        order = torch.randperm(num_experts, generator=generator)
    else:
        counts = torch.from_numpy(usage.counts[site.kind][site.layer])
        order = counts.argsort(descending=True, stable=True)
    return order[torch.arange(num_new) % num_experts]


def _disturbed(rows: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    return rows + _ROW_NOISE * rows.square().mean(1, keepdim=True).sqrt() * noise


def _drawn(config: MoLMConfig, name: str, like: Tensor, number: int, generator: torch.Generator) -> Tensor:
    shape = (number, *like.shape[1:])
    if like.dim() == 3:
        return (torch.rand(shape, generator=generator).mul(2).sub(1) / shape[1]).to(like)
    std = 1.0 if name.endswith("expert_centroids") else config.initializer_range
    return torch.randn(shape, generator=generator).mul(std).to(like)
