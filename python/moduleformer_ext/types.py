"""The named tuples that ops take and give. Only torch is needed to read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["BlockWeights", "ExpertLayout", "NormedRouter", "RouteTopK", "RoutingSums", "Segments"]

Segments = Tensor | Sequence[Tensor]
"""A parameter with an expert dimension: one tensor [E, ...], or consecutive segments [E_i, ...] of it, a
`torch.nn.ParameterList` among such sequences."""


class RouteTopK(NamedTuple):
    """What a router decided for T tokens and E experts, and the sums that those of ops.losses are made of.

    Floating-point fields are float32 (float64 for float64 input); all of them are differentiable.
    """

    gates: Tensor
    """[T, K] weights of the chosen experts, in the order of choice (descending probability)."""
    expert_ids: Tensor
    """[T, K] int32."""
    prob_sum: Tensor
    """[E] sum over tokens of p(e | t), p being the softmax over all experts."""
    plogp_sum: Tensor
    """[] sum over tokens and experts of p log p."""
    logsumexp_sq_sum: Tensor
    """[] sum over tokens of logsumexp(logits)^2."""
    counts: Tensor
    """[E] int32, the slots that each expert got."""
    logits: Tensor
    """[T, E]."""


class RoutingSums(NamedTuple):
    """The fields of :class:`RouteTopK` that routing losses are made of, over the tokens of several processes."""

    prob_sum: Tensor
    """[E]."""
    plogp_sum: Tensor
    """[]."""
    logsumexp_sq_sum: Tensor
    """[]."""
    counts: Tensor
    """[E], in the dtype of the other sums."""
    num_tokens: Tensor
    """[], at least 1, in the dtype of the other sums."""
    num_slots: Tensor
    """[], at least 1, in the dtype of the other sums."""


class ExpertLayout(NamedTuple):
    """The slots (token, choice) sorted by expert. Slot s = token * K + choice; the sort is stable. All
    tensors are int32.
    """

    counts: Tensor
    """[E] slots per expert."""
    offsets: Tensor
    """[E + 1] where each expert's slots begin in expert order; the last one is S."""
    slot_order: Tensor
    """[S] place in expert order -> slot."""
    position: Tensor
    """[S] slot -> place in expert order, the inverse of slot_order."""
    num_choices: int
    """K, the experts chosen per token."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts.shape[0]

    @property
    def num_slots(self) -> int:
        """S = T * K."""
        return self.slot_order.shape[0]


class NormedRouter(NamedTuple):
    """A layer norm and the router behind it, for tokens of D features: what a layer does before its E experts.

    The norm's two have the dtype of the tokens, the router's any: float64 beside float64 tokens alone.
    """

    gate: str
    """The router's kind: "linear", "mlp" or "gmm"."""
    hidden_weight: Tensor | None
    """[G, D], for "mlp" and "gmm"; None for "linear"."""
    hidden_bias: Tensor | None
    """[G], for "mlp"; None for the others."""
    gate_weight: Segments
    """[E, G] rows of the experts ("linear": [E, D]), or segments. Centroids of "gmm" have length exp(temperature)."""
    k: int
    """Experts per token."""
    order: str
    """As in :func:`moduleformer_ext.ops.route_topk`."""
    norm_weight: Tensor
    """[D]."""
    norm_bias: Tensor
    """[D]."""
    norm_epsilon: float
    """Added to the variance."""


class BlockWeights(NamedTuple):
    """The weights of a block, under the names of the ops that are its halves: attention_layer_decode and
    ffn_layer_decode of :mod:`moduleformer_ext.ops`, which say their shapes. Matrices of experts are
    :data:`Segments`, or QuantisedMatrices of :mod:`moduleformer_ext.quantised`.
    """

    attention_router: NormedRouter
    query_weight: Any
    output_weight: Any
    k_weight: Tensor | None
    k_bias: Tensor | None
    v_weight: Tensor | None
    v_bias: Tensor | None
    ffn_router: NormedRouter
    up: Any
    down: Any
    activation: str = "gelu_tanh"


# Named tuples are pytrees by themselves; only an exported program that is saved needs to know them by name.
pytree._register_namedtuple(RouteTopK, serialized_type_name="moduleformer_ext.types.RouteTopK")
pytree._register_namedtuple(ExpertLayout, serialized_type_name="moduleformer_ext.types.ExpertLayout")
