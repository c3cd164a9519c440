"""The description of a model's experts of one kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PerLayer = int | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The mixtures of experts of one kind: query and output projections of attention, or feed-forward layers.

    Where layers may differ, a field is one number or one per layer.
    """

    hidden: int
    """Width of one expert; of attention, of all its heads together."""
    num_experts: PerLayer = 32
    k: int = 2
    """Experts per token."""
    normaliser_rows: PerLayer = 0
    """Router rows of pruned experts that stay in the softmax without being selectable."""
    num_new: PerLayer = 0
    """How many of a layer's experts, its last ones, are new: those that train while the others are frozen."""
    places: tuple[tuple[int, ...], ...] | None = None
    """Per layer, where the expert that was made as number 0, 1, 2, … is now; -1 if it was pruned. None: all experts
    are where they were made."""

    def __post_init__(self) -> None:
        for name in (*PER_LAYER, "places"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))

    def in_layer(self, name: str, layer: int) -> int:
        """A field that may differ between layers, in one of them."""
        value = getattr(self, name)
        return value[layer] if isinstance(value, tuple) else value


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, (list, tuple)) else value


PER_LAYER = ("num_experts", "normaliser_rows", "num_new")

PUBLISHED_NAMES: Mapping[str, Mapping[str, str]] = {
    "attention": {
        "hidden": "att_hidden",
        "num_experts": "n_att_experts",
        "k": "k_att",
        "normaliser_rows": "att_normaliser_rows",
        "num_new": "n_new_att_experts",
        "places": "att_expert_places",
    },
    "ffn": {
        "hidden": "ffd_hidden",
        "num_experts": "n_mlp_experts",
        "k": "k_mlp",
        "normaliser_rows": "mlp_normaliser_rows",
        "num_new": "n_new_mlp_experts",
        "places": "mlp_expert_places",
    },
}
"""Kind of experts -> field -> what files and options call it, as the published configurations do."""


def flatten(kind: str, experts: ExpertsConfig) -> dict[str, Any]:
    """The fields under their published names."""
    return {published: getattr(experts, name) for name, published in PUBLISHED_NAMES[kind].items()}


def split(fields: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Of fields under published names: those of each kind of experts, and the others."""
    known = {published: (kind, name) for kind, names in PUBLISHED_NAMES.items() for name, published in names.items()}
    of_experts: dict[str, dict[str, Any]] = {kind: {} for kind in PUBLISHED_NAMES}
    others = {}
    for published, value in fields.items():
        if published in known:
            kind, name = known[published]
            of_experts[kind][name] = value
        else:
            others[published] = value
    return of_experts, others
