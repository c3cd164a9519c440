"""Which experts a domain uses, from the routers' own counts, and how far two domains are apart.

With n_{l,e}(d) the slots that domain d gave expert e of layer l, the frequency is f = n / sum_e n (or n / max_e n), and
the divergence of domain a from b in layer l is

    KL_l(a || b) = sum_e f_{l,e}(a) log(f_{l,e}(a) / f_{l,e}(b))        [nats]

where half a slot is added to every count first, so that an expert unused by b costs much, not infinity.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.nn import BlockRoutes, EvaluationMode
from moduleformer_ext.surgery.anatomy import KINDS, sites

CountArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
NORMALISERS = ("max", "sum")


@dataclass
class ExpertUsage:
    """Slots per expert: for each kind of layer, one array [E] per layer."""

    counts: dict[str, list[CountArray]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def add(self, routes: Sequence[BlockRoutes]) -> None:
        """Add the counts of one forward pass, given each layer's routes."""
        for kind in KINDS:
            added = [_to_array(getattr(layer, kind).counts) for layer in routes]
            known = self.counts[kind]
            self.counts[kind] = [a + b for a, b in zip(known, added, strict=True)] if known else added

    def frequencies(self, kind: str, normalise: str = "sum") -> list[FloatArray]:
        """Per layer, each expert's slots over those of the layer ("sum") or of its busiest expert ("max")."""
        if normalise not in NORMALISERS:
            raise ValueError(f"usage: normalise must be one of {', '.join(NORMALISERS)}, got {normalise!r}")
        return [counts / max(getattr(counts, normalise)(), 1) for counts in self.counts[kind]]

    def __add__(self, other: ExpertUsage) -> ExpertUsage:
        """The counts of both together."""
        pairs = {kind: zip(self.counts[kind], other.counts[kind], strict=True) for kind in KINDS}
        return ExpertUsage({kind: [a + b for a, b in layers] for kind, layers in pairs.items()})

    def load_entropy(self) -> float:
        """Entropy of the experts' loads, averaged over routers and scaled to [0, 1] (1: all equally used)."""
        layers = zip(*(self.counts[kind] for kind in KINDS), strict=True)
        return float(np.mean([_normalised_entropy(counts) for layer in layers for counts in layer]))

    def check_fits(self, config: MoLMConfig) -> None:
        """Raise a ValueError unless the counts are of a model of this shape."""
        for kind in KINDS:
            if len(self.counts[kind]) != config.n_layer:
                raise ValueError(
                    f"usage: {kind} counts must be of {config.n_layer} layers, got {len(self.counts[kind])}"
                )
        for site in sites(config):
            num_counts = len(self.counts[site.kind][site.layer])
            if num_counts != site.num_experts(config):
                raise ValueError(
                    f"usage: counts of {site} must be of {site.num_experts(config)} experts, got {num_counts}"
                )

    def to_dict(self) -> dict[str, list[list[int]]]:
        """Counts as JSON has them."""
        return {kind: [counts.tolist() for counts in self.counts[kind]] for kind in KINDS}

    @classmethod
    def from_dict(cls, counts: Mapping[str, Any]) -> ExpertUsage:
        """The inverse of :meth:`to_dict`."""
        return cls({kind: [np.array(layer, dtype=np.int64) for layer in counts[kind]] for kind in KINDS})


@torch.no_grad()
def count_usage(model: MoLMForCausalLM, batches: Iterable[Tensor]) -> ExpertUsage:
    """The expert activations of token batches [B, T], each read without a past.

    A training loop or an evaluation has the counts already: ``model(..., output_routes=True).routes`` is what
    :meth:`ExpertUsage.add` takes.
    """
    usage, evaluating = ExpertUsage(), EvaluationMode(model)
    for tokens in batches:
        with evaluating:
            usage.add(model(tokens, output_aux_loss=False, output_routes=True).routes or [])
    return usage


def usage_table(usage: Mapping[str, ExpertUsage], config: MoLMConfig) -> str:
    """CSV, one line per domain, layer and expert: its identity, its slots, and both normalised frequencies."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["domain", "layer", "kind", "expert", "identity", "slots", "of_layer_sum", "of_layer_max"])
    for domain, counted in usage.items():
        for site in sites(config):
            by_sum, by_max = (counted.frequencies(site.kind, n)[site.layer] for n in ("sum", "max"))
            slots = counted.counts[site.kind][site.layer]
            for expert, identity in enumerate(site.identities(config)):
                frequencies = (f"{by_sum[expert]:.6g}", f"{by_max[expert]:.6g}")
                writer.writerow([domain, site.layer, site.kind, expert, identity, slots[expert], *frequencies])
    return text.getvalue()


def divergences(usage: Mapping[str, ExpertUsage]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """KL(a || b) of every layer, as ``[kind][a][b]``, for all ordered pairs of domains."""
    return {
        kind: {a: {b: layer_divergences(usage[a], usage[b], kind).tolist() for b in usage if b != a} for a in usage}
        for kind in KINDS
    }


def _to_array(counts: Tensor) -> CountArray:
    return counts.detach().cpu().numpy().astype(np.int64)


def kl_divergence(counts: CountArray, other: CountArray) -> float:
    """KL divergence in nats of the distribution of `counts` [E] from that of `other` [E]."""
    p, q = ((n + 0.5) / (n + 0.5).sum() for n in (counts, other))
    return float((p * np.log(p / q)).sum())


def layer_divergences(usage: ExpertUsage, other: ExpertUsage, kind: str) -> FloatArray:
    """KL(usage || other) of every layer [L]."""
    pairs = zip(usage.counts[kind], other.counts[kind], strict=True)
    return np.array([kl_divergence(counts, counter) for counts, counter in pairs])


def _normalised_entropy(counts: CountArray) -> float:
    if len(counts) < 2:
        return 1.0
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log(p)).sum() / np.log(len(counts)))
