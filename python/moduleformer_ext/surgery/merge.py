"""One model out of two that were extended from the same base, each with knowledge of its own.

Experts are matched by identity. One that both models have with the same bits is there once. What one model has and the
other does not is taken over with its identity. Where both inserted an expert under the same number, unaware of one
another, the second's gets the next free number. The routing of the result is

    p(m | x) = softmax([A; A'; A''] h(x))

with A' and A'' the rows that the models added: nothing is averaged, and everything else must be the same bits in both.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.models.state import canonical_state
from moduleformer_ext.surgery.anatomy import KINDS, Site, sites
from moduleformer_ext.surgery.compare import check_same_shape
from moduleformer_ext.surgery.prune import per_layer

_FUNCTION_FIELDS = ("k_att", "k_mlp", "activation_function", "router_order", "layer_norm_epsilon", "stick_epsilon")
"""What decides what the same weights compute, beside their shapes."""

State = dict[str, Tensor]


class _Origin(NamedTuple):
    """An expert of the merged model."""

    identity: int
    model: int
    """0 or 1: where it comes from."""
    place: int
    """In that model."""
    is_new: bool


@torch.no_grad()
def merge(first: MoLMForCausalLM, second: MoLMForCausalLM) -> MoLMForCausalLM:
    """The model with the experts of both, in evaluation mode; the given ones are left as they are.

    Experts that are new in the models that have them are new in the result too. Fields of the configuration that do not
    change what a model computes are those of the first.

    Raises:
        ValueError: the models differ in more than their numbers of experts, in a parameter that is not an expert's, or
            in an expert that is not new in both; the message names what.
    """
    configs = first.config, second.config
    check_same_shape("merge", *configs, more=_FUNCTION_FIELDS)
    states = canonical_state(first), canonical_state(second)
    _check_shared_parameters(configs[0], states)
    origins = {site: _origins(site, configs, states) for site in sites(configs[0])}
    state = states[0]
    for site, experts in origins.items():
        for name in (*site.matrices, site.rows(configs[0])):
            sources = [own[name] for own in states]
            state[name] = torch.stack([sources[expert.model][expert.place] for expert in experts])
    return MoLMForCausalLM.from_state(_merged_config(configs[0], origins), state)


def _check_shared_parameters(config: MoLMConfig, states: tuple[State, State]) -> None:
    routed = {name for site in sites(config) for name in (*site.matrices, site.rows(config))}
    names = sorted((states[0].keys() | states[1].keys()) - routed)
    if different := [name for name in names if not _same(states[0].get(name), states[1].get(name))]:
        raise ValueError(
            "merge: models must be the same but for their experts and router rows, got different "
            f"{', '.join(different[:5])}{', ...' if len(different) > 5 else ''}; train new experts alone to merge them"
        )


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is not None and second is not None and first.dtype == second.dtype and torch.equal(first, second)


def _origins(site: Site, configs: tuple[MoLMConfig, MoLMConfig], states: tuple[State, State]) -> list[_Origin]:
    """Where the experts of the merged site come from, in order: those that are not new first."""
    names = (*site.matrices, site.rows(configs[0]))
    found = [_experts(site, model, config) for model, config in enumerate(configs)]
    free = max(len(site.places(config)) for config in configs)
    merged = dict(found[0])
    for identity, own in found[1].items():
        other = found[0].get(identity)
        if other is None:
            merged[identity] = own
        elif all(torch.equal(states[0][name][other.place], states[1][name][own.place]) for name in names):
            merged[identity] = other._replace(is_new=other.is_new and own.is_new)
        elif other.is_new and own.is_new:
            merged[free] = own._replace(identity=free)
            free += 1
        else:
            raise ValueError(
                f"merge: expert {identity} of {site} must be the same in both models, or new in both, got two versions"
            )
    return sorted(merged.values(), key=lambda expert: (expert.is_new, expert.model))


def _experts(site: Site, model: int, config: MoLMConfig) -> dict[int, _Origin]:
    first_new = site.num_experts(config) - site.num_new(config)
    return {
        identity: _Origin(identity, model, place, place >= first_new)
        for place, identity in enumerate(site.identities(config))
    }


def _merged_config(config: MoLMConfig, origins: dict[Site, list[_Origin]]) -> MoLMConfig:
    changes: dict[str, Any] = {}
    for kind in KINDS:
        layers = [origins[Site(kind, layer)] for layer in range(config.n_layer)]
        changes[kind] = dataclasses.replace(
            getattr(config, kind),
            num_experts=per_layer([len(experts) for experts in layers]),
            num_new=per_layer([sum(expert.is_new for expert in experts) for experts in layers]),
            places=tuple(map(_places, layers)),
        )
    return config.replace(**changes)


def _places(experts: list[_Origin]) -> tuple[int, ...]:
    places = [-1] * (1 + max(expert.identity for expert in experts))
    for place, expert in enumerate(experts):
        places[expert.identity] = place
    return tuple(places)
