"""Removing experts: a plan of what stays, made from how often experts are used, and the smaller model.

The frequency of an expert is its share of the layer's slots, or its slots over those of the layer's busiest expert
(:meth:`ExpertUsage.frequencies <moduleformer_ext.surgery.ExpertUsage.frequencies>`). Every layer keeps at least the k
experts that a token is routed to. The result is a smaller model of the same class; nothing is masked.

What pruning does to the gates of experts that are never chosen depends on the router's order. With ``topk_softmax``
they do not matter. With ``softmax_topk`` they took part in the softmax: without their rows every kept gate is larger by
the factor 1 / (1 - sum of p over the pruned experts); ``keep_normaliser=True`` keeps the rows in the softmax, where
they cost a router row each but can no longer be chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.models.state import canonical_state
from moduleformer_ext.surgery.anatomy import (
    KINDS,
    Site,
    count_parameters,
    expert_size,
    row_size,
    sites,
)
from moduleformer_ext.surgery.usage import ExpertUsage


@dataclass(frozen=True)
class PruningPlan:
    """Which experts of a model stay.

    Raises:
        ValueError: a layer would keep fewer than k experts, or experts it does not have.
    """

    config: MoLMConfig
    """Of the model to prune."""
    kept: Mapping[Site, tuple[int, ...]]
    """Places of the experts that stay, ascending, for every site."""
    keep_normaliser: bool = False
    """Keep the router rows of pruned experts in the softmax."""

    def __post_init__(self) -> None:
        if set(self.kept) != set(sites(self.config)):
            raise ValueError("prune: kept must name every layer's attention and feed-forward experts once")
        for site, places in self.kept.items():
            num_experts, k = site.num_experts(self.config), site.k(self.config)
            if list(places) != sorted(set(places)) or not all(0 <= place < num_experts for place in places):
                raise ValueError(
                    f"prune: kept experts of {site} must ascend within 0 to {num_experts - 1}, got {list(places)}"
                )
            if len(places) < k:
                raise ValueError(
                    f"prune: {site} must keep at least {k} experts, which a token is routed to, got {len(places)}"
                )
        if self.keep_normaliser and self.config.router_order != "softmax_topk":
            raise ValueError(
                f"prune: keep_normaliser must be False for router_order {self.config.router_order!r}, whose gates are "
                "normalised over the chosen experts alone"
            )

    def dropped(self, site: Site) -> list[int]:
        """Places of the experts that go."""
        kept = set(self.kept[site])
        return [place for place in range(site.num_experts(self.config)) if place not in kept]

    @property
    def pruned_config(self) -> MoLMConfig:
        """The description of the smaller model."""
        config = self.config
        changes: dict[str, Any] = {}
        for kind in KINDS:
            layers = [Site(kind, layer) for layer in range(config.n_layer)]
            first_new = [site.num_experts(config) - site.num_new(config) for site in layers]
            rows = [
                site.num_normaliser_rows(config) + (len(self.dropped(site)) if self.keep_normaliser else 0)
                for site in layers
            ]
            changes[kind] = dataclasses.replace(
                getattr(config, kind),
                num_experts=per_layer([len(self.kept[site]) for site in layers]),
                num_new=per_layer(
                    [sum(p >= first for p in self.kept[site]) for site, first in zip(layers, first_new, strict=True)]
                ),
                normaliser_rows=per_layer(rows),
                places=tuple(self._places(site) for site in layers),
            )
        return config.replace(**changes)

    def _places(self, site: Site) -> tuple[int, ...]:
        moved = {old: new for new, old in enumerate(self.kept[site])}
        return tuple(moved.get(place, -1) for place in site.places(self.config))

    @property
    def remaining(self) -> float:
        """Parameters of the smaller model over those of the model."""
        return count_parameters(self.pruned_config) / count_parameters(self.config)

    def summary(self) -> str:
        """What would stay and go, as a table; experts are named by identity."""
        lines = []
        for site in self.kept:
            identities = site.identities(self.config)
            gone = ", ".join(str(identities[place]) for place in self.dropped(site)) or "none"
            lines.append(f"{site!s:<20} keeps {len(self.kept[site]):3d} of {len(identities):3d}; pruned: {gone}")
        before, after = count_parameters(self.config), count_parameters(self.pruned_config)
        lines.append(f"parameters {before} -> {after} ({100 * after / before:.1f} %)")
        return "\n".join(lines)


def per_layer(values: Sequence[int]) -> int | tuple[int, ...]:
    """A field of the configuration in its simplest form."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def plan_by_threshold(
    config: MoLMConfig,
    usage: ExpertUsage,
    threshold: float,
    *,
    normalise: str = "max",
    keep_normaliser: bool = False,
) -> PruningPlan:
    """Prune the experts whose frequency is below ``threshold``; every layer keeps its k most used ones.

    Raises:
        ValueError: the usage is of another model, or the threshold is not in [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"prune: threshold must be in [0, 1], got {threshold}")
    ranking = _least_used_first(config, usage, normalise)
    dropped = [(site, place) for site, place, frequency in ranking if frequency < threshold]
    return _plan_without(config, dropped, keep_normaliser)


def plan_by_size(
    config: MoLMConfig,
    usage: ExpertUsage,
    remaining: float,
    *,
    normalise: str = "max",
    keep_normaliser: bool = False,
) -> PruningPlan:
    """Prune the least frequent experts of all layers until at most ``remaining`` of the model's parameters are left.

    Raises:
        ValueError: the usage is of another model, or k experts per layer are more than that already.
    """
    size = count_parameters(config)
    row = 0 if keep_normaliser else row_size(config)
    ranking = _least_used_first(config, usage, normalise)
    smallest = size - sum(expert_size(config, site.kind) + row for site, _, _ in ranking)
    if not smallest <= remaining * size <= size:
        raise ValueError(
            f"prune: remaining must be in [{smallest / size:.4f}, 1], as every layer keeps k experts, got {remaining:g}"
        )
    dropped = []
    left = size
    for site, place, _ in ranking:
        if left <= remaining * size:
            break
        left -= expert_size(config, site.kind) + row
        dropped.append((site, place))
    return _plan_without(config, dropped, keep_normaliser)


def _least_used_first(config: MoLMConfig, usage: ExpertUsage, normalise: str) -> list[tuple[Site, int, float]]:
    """(site, place, frequency) of all experts that may go: all but the k most used of each site. Among equals the
    higher place comes first.
    """
    usage.check_fits(config)
    ranking: list[tuple[float, int, Site]] = []
    for site in sites(config):
        frequencies = usage.frequencies(site.kind, normalise)[site.layer]
        of_site = sorted((float(frequency), -place, site) for place, frequency in enumerate(frequencies))
        ranking += of_site[: len(of_site) - site.k(config)]
    ranking.sort(key=lambda entry: entry[:2])
    return [(site, -negative, frequency) for frequency, negative, site in ranking]


def _plan_without(config: MoLMConfig, dropped: Sequence[tuple[Site, int]], keep_normaliser: bool) -> PruningPlan:
    config.require_whole_experts("prune")
    gone = set(dropped)
    kept = {
        site: tuple(place for place in range(site.num_experts(config)) if (site, place) not in gone)
        for site in sites(config)
    }
    return PruningPlan(config, kept, keep_normaliser)


@torch.no_grad()
def prune(model: MoLMForCausalLM, plan: PruningPlan) -> MoLMForCausalLM:
    """The smaller model, in evaluation mode; the given one is left as it is.

    Raises:
        ValueError: the plan is of another model.
    """
    if plan.config != model.config:
        raise ValueError("prune: plan must be made for this model's configuration")
    state = canonical_state(model)
    for site in sites(model.config):
        kept, dropped = torch.tensor(plan.kept[site]), plan.dropped(site)
        rows = site.rows(model.config)
        if plan.keep_normaliser and dropped:
            pruned_rows = state[rows][torch.tensor(dropped)]
            earlier = state.get(site.normaliser_rows)
            state[site.normaliser_rows] = pruned_rows if earlier is None else torch.cat([earlier, pruned_rows])
        for name in (*site.matrices, rows):
            state[name] = state[name][kept.to(state[name].device)]
    return MoLMForCausalLM.from_state(plan.pruned_config, state)
