"""Where a model keeps its experts: names of tensors, fields of the configuration, numbers of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn

from moduleformer_ext.models import ExpertsConfig, MoLMConfig, MoLMForCausalLM
from moduleformer_ext.nn import ExpertLinear, Router
from moduleformer_ext.ops.grouped_gemm import GATED_ACTIVATIONS

ATTENTION, FFN = KINDS = ("attention", "ffn")
"""The two kinds of experts: query and output projections of attention, and feed-forward experts."""

_MODULES = {ATTENTION: "attn.q_proj", FFN: "mlpf"}
_ROWS = {"linear": "w_gate.0.weight", "mlp": "w_gate.3.weight", "gmm": "expert_centroids"}


@dataclass(frozen=True)
class Site:
    """The mixture of experts of one kind in one layer."""

    kind: str
    layer: int

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}"

    @property
    def prefix(self) -> str:
        """Beginning of the names of its tensors."""
        return f"transformer.h.{self.layer}.{_MODULES[self.kind]}"

    @property
    def matrices(self) -> tuple[str, str]:
        """Names of the two tensors [E, in, out] of its experts."""
        return f"{self.prefix}.experts.weight", f"{self.prefix}.output_experts.weight"

    def rows(self, config: MoLMConfig) -> str:
        """Name of the router's tensor [E, row_size]."""
        return f"{self.prefix}.gate.{_ROWS[config.gate_type]}"

    @property
    def normaliser_rows(self) -> str:
        """Name of the rows [U, row_size] of pruned experts that stay in the softmax."""
        return f"{self.prefix}.gate.normaliser_rows"

    def experts(self, config: MoLMConfig) -> ExpertsConfig:
        """Their description, of all layers."""
        return getattr(config, self.kind)

    def num_experts(self, config: MoLMConfig) -> int:
        """E."""
        return self.experts(config).in_layer("num_experts", self.layer)

    def num_normaliser_rows(self, config: MoLMConfig) -> int:
        """U."""
        return self.experts(config).in_layer("normaliser_rows", self.layer)

    def num_new(self, config: MoLMConfig) -> int:
        """How many of the experts, the last ones, are new."""
        return self.experts(config).in_layer("num_new", self.layer)

    def k(self, config: MoLMConfig) -> int:
        """Experts per token."""
        return self.experts(config).k

    def places(self, config: MoLMConfig) -> tuple[int, ...]:
        """Where the expert with identity 0, 1, 2, … is; -1 if it was pruned."""
        places = self.experts(config).places
        return tuple(range(self.num_experts(config))) if places is None else places[self.layer]

    def identities(self, config: MoLMConfig) -> list[int]:
        """The identity of the expert at place 0, 1, 2, …: the inverse of :meth:`places`."""
        places = self.places(config)
        return sorted((i for i, place in enumerate(places) if place >= 0), key=places.__getitem__)

    def modules(self, model: MoLMForCausalLM) -> tuple[ExpertLinear, ExpertLinear, Router]:
        """Its experts and router in a model."""
        parent = model.get_submodule(self.prefix)
        return cast("tuple[ExpertLinear, ExpertLinear, Router]", (parent.experts, parent.output_experts, parent.gate))

    def expert_parameters(self, model: MoLMForCausalLM) -> list[tuple[nn.Module, str]]:
        """The parameters with an expert dimension, as (module, name)."""
        up, down, gate = self.modules(model)
        return [(up, "weight"), (down, "weight"), gate.rows_parameter]


def sites(config: MoLMConfig) -> Iterator[Site]:
    """All mixtures of experts, layer by layer."""
    return (Site(kind, layer) for layer in range(config.n_layer) for kind in KINDS)


def row_size(config: MoLMConfig) -> int:
    """Width of a router's row."""
    return config.n_embd if config.gate_type == "linear" else config.gating_size


def expert_size(config: MoLMConfig, kind: str) -> int:
    """Parameters of one expert, its router row not counted."""
    gated = kind == FFN and config.activation_function in GATED_ACTIVATIONS
    return (3 if gated else 2) * config.n_embd * getattr(config, kind).hidden


def count_parameters(config: MoLMConfig) -> int:
    """Parameters of a model, from its description alone."""
    d, v = config.n_embd, config.vocab_size
    total = v * d * (1 if config.tie_word_embeddings else 2) + 2 * d
    norms = 4 * d
    keys_values = 0 if config.identity_kv else 2 * (d + 1) * config.attention.hidden
    gate = {"linear": 0, "mlp": (d + 1) * config.gating_size, "gmm": d * config.gating_size + 1}[config.gate_type]
    total += config.n_layer * (norms + keys_values + 2 * gate)
    for site in sites(config):
        rows = site.num_experts(config) + site.num_normaliser_rows(config)
        total += site.num_experts(config) * expert_size(config, site.kind) + rows * row_size(config)
    return total
