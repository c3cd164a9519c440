"""What became of every expert between two models of one family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.models.state import canonical_state
from moduleformer_ext.surgery.anatomy import Site, sites

_SHAPE_FIELDS = (
    "vocab_size",
    "n_embd",
    "n_layer",
    "n_head",
    "att_hidden",
    "ffd_hidden",
    "gate_type",
    "gating_size",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class SiteComparison:
    """One layer's experts of one kind, by identity."""

    matrices: Mapping[int, float]
    """Experts of both models: ||W_second - W_first|| / ||W_first|| over both matrices."""
    rows: Mapping[int, float]
    """The same for their router rows."""
    only_first: Sequence[int]
    only_second: Sequence[int]


@dataclass(frozen=True)
class Comparison:
    """Two models, site by site, and the relative change of every parameter without an expert dimension."""

    experts: Mapping[Site, SiteComparison]
    others: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        experts = [
            {
                "layer": site.layer,
                "kind": site.kind,
                "matrices": dict(found.matrices),
                "rows": dict(found.rows),
                "only_first": list(found.only_first),
                "only_second": list(found.only_second),
            }
            for site, found in self.experts.items()
        ]
        return {"experts": experts, "others": dict(self.others)}

    def summary(self) -> str:
        """A table, one line per site, and the other parameters that changed."""
        lines = []
        for site, found in self.experts.items():
            changed = {i: change for i, change in found.matrices.items() if change or found.rows[i]}
            parts = [f"{len(found.matrices) - len(changed)} the same"]
            if changed:
                parts.append("changed: " + ", ".join(f"{i} ({change:.2g})" for i, change in changed.items()))
            for name, identities in (("first", found.only_first), ("second", found.only_second)):
                if identities:
                    parts.append(f"only in the {name}: " + ", ".join(map(str, identities)))
            lines.append(f"{site!s:<20} " + "; ".join(parts))
        moved = {name: change for name, change in self.others.items() if change}
        lines.append(f"other parameters     {len(self.others) - len(moved)} the same, {len(moved)} changed")
        lines += [f"  {name} ({change:.2g})" for name, change in moved.items()]
        return "\n".join(lines)


@torch.no_grad()
def compare(first: MoLMForCausalLM, second: MoLMForCausalLM) -> Comparison:
    """Follow every expert by its identity from one model to the other.

    Raises:
        ValueError: the models differ in more than their numbers of experts; the message names the fields.
    """
    check_same_shape("compare", first.config, second.config)
    states = canonical_state(first), canonical_state(second)
    experts = {site: _compare_site(site, (first.config, second.config), states) for site in sites(first.config)}
    routed = {
        name for site in sites(first.config) for name in (*site.matrices, site.rows(first.config), site.normaliser_rows)
    }
    names = [name for name in states[0] if name not in routed]
    return Comparison(experts, {name: _relative(states[0][name], states[1][name]) for name in names})


def check_same_shape(op: str, first: MoLMConfig, second: MoLMConfig, *, more: Sequence[str] = ()) -> None:
    """Raise a ValueError that names the fields, of those of the shape and `more`, in which two models cannot be of one
    family; or where one has quantised experts.
    """
    for config in (first, second):
        config.require_whole_experts(op)
    one, other = first.to_dict(), second.to_dict()
    different = [name for name in (*_SHAPE_FIELDS, *more) if one[name] != other[name]]
    if different:
        values = ", ".join(f"{name} {one[name]!r} and {other[name]!r}" for name in different)
        raise ValueError(f"{op}: models must agree but for their experts, got {values}")


def _compare_site(
    site: Site, configs: tuple[MoLMConfig, MoLMConfig], states: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> SiteComparison:
    places = [{identity: place for place, identity in enumerate(site.identities(config))} for config in configs]
    shared = sorted(places[0].keys() & places[1].keys())
    row_names = [site.rows(config) for config in configs]

    def pick(index: int, name: str, identity: int) -> Tensor:
        return states[index][name][places[index][identity]]

    def both(identity: int) -> float:
        old, new = (torch.cat([pick(i, name, identity).flatten() for name in site.matrices]) for i in (0, 1))
        return _relative(old, new)

    return SiteComparison(
        matrices={identity: both(identity) for identity in shared},
        rows={i: _relative(pick(0, row_names[0], i), pick(1, row_names[1], i)) for i in shared},
        only_first=sorted(places[0].keys() - places[1].keys()),
        only_second=sorted(places[1].keys() - places[0].keys()),
    )


def _relative(old: Tensor, new: Tensor) -> float:
    old, new = old.double(), new.double()
    return float((new - old).norm() / old.norm().clamp_min(1e-30))
