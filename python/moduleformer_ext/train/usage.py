"""Which experts a domain uses, from the routers' own counts, and how far two domains are apart.

With n_{l,e}(d) the slots that domain d gave expert e of layer l, the frequency is f = n / sum_e n, and the
divergence of domain a from b in layer l is

    KL_l(a || b) = sum_e f_{l,e}(a) log(f_{l,e}(a) / f_{l,e}(b))        [nats]

where half a slot is added to every count first, so that an expert unused by b costs much, not infinity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moduleformer_ext.nn import BlockRoutes

CountArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
KINDS = ("attention", "ffn")


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

    def frequencies(self, kind: str) -> list[FloatArray]:
        """Fraction of a layer's slots that went to each expert, per layer."""
        return [counts / max(counts.sum(), 1) for counts in self.counts[kind]]


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


def load_entropy(routes: Sequence[BlockRoutes]) -> float:
    """Entropy of the experts' loads, averaged over routers and scaled to [0, 1] (1: all equally used)."""
    return float(np.mean([_normalised_entropy(_to_array(route.counts)) for layer in routes for route in layer]))


def _normalised_entropy(counts: CountArray) -> float:
    if len(counts) < 2:
        return 1.0
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log(p)).sum() / np.log(len(counts)))
