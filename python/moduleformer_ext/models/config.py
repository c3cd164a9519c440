"""The description of a model: everything but its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moduleformer_ext.nn.experts import GATED_ACTIVATIONS

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
} | {name: name for name in sorted(GATED_ACTIVATIONS)}
"""Names that a configuration may use for an activation -> the name in :mod:`moduleformer_ext.ops`."""

GATE_TYPES = ("mlp", "linear", "gmm")
ROUTER_ORDERS = ("softmax_topk", "topk_softmax")
AUX_LOSS_TYPES = ("mi", "switch", "concentration", "none")

_PER_LAYER_FIELDS = (
    "n_att_experts",
    "n_mlp_experts",
    "att_normaliser_rows",
    "mlp_normaliser_rows",
    "n_new_att_experts",
    "n_new_mlp_experts",
)


@dataclass(frozen=True, kw_only=True)
class MoLMConfig:
    """A ModuleFormer language model. Fields and defaults are those of the published configurations.

    Example:
        >>> config = MoLMConfig.preset("molm-4b-k2", block_size=1024)
        >>> config.n_embd, config.n_layer, config.k_att
        (1024, 24, 2)

    Raises:
        ValueError: a field is out of range or contradicts another; the message names it.
    """

    vocab_size: int = 50295
    n_embd: int = 1024
    """Width of the residual stream, D."""
    n_layer: int = 24
    n_head: int = 8
    """Heads of keys and values, and of each routed query."""
    att_hidden: int = 512
    """Width of all heads together. With ``n_head == 1`` and ``att_hidden == n_embd`` keys and values are the tokens."""
    ffd_hidden: int = 2048
    """Width of one feed-forward expert."""
    n_att_experts: int | tuple[int, ...] = 32
    """Attention experts, the same in every layer or one number per layer."""
    k_att: int = 2
    """Attention experts per token."""
    n_mlp_experts: int | tuple[int, ...] = 32
    """Feed-forward experts, the same in every layer or one number per layer."""
    k_mlp: int = 2
    """Feed-forward experts per token."""
    activation_function: str = "gelu_new"

    gate_type: str = "mlp"
    """The gate network: ``"mlp"``, ``"linear"`` or ``"gmm"``."""
    gating_size: int = 256
    """Hidden width of the gate network, for ``"mlp"`` and ``"gmm"``."""
    router_order: str = "softmax_topk"
    """Gates from the softmax over all experts (``"softmax_topk"``) or over the chosen ones (``"topk_softmax"``)."""
    sample_topk: int = 0
    """In training, how many of the k experts of a token are sampled."""
    aux_loss_type: str = "mi"
    """``"mi"`` (mutual information), ``"concentration"``, ``"switch"`` (with z-loss) or ``"none"``."""
    aux_loss_weight: float = 0.0

    att_normaliser_rows: int | tuple[int, ...] = 0
    """Router rows of pruned attention experts that stay in the softmax without being selectable, per layer."""
    mlp_normaliser_rows: int | tuple[int, ...] = 0
    n_new_att_experts: int | tuple[int, ...] = 0
    """How many of a layer's attention experts, its last ones, are new: those that train while the others are frozen."""
    n_new_mlp_experts: int | tuple[int, ...] = 0
    att_expert_places: tuple[tuple[int, ...], ...] | None = None
    """Per layer, where the attention expert that was made as number 0, 1, 2, … is now; -1 if it was pruned. None:
    all experts are where they were made."""
    mlp_expert_places: tuple[tuple[int, ...], ...] | None = None

    block_size: int = 512
    """New tokens per training segment."""
    history_length: int = 512
    """Past tokens that a training segment attends to."""
    stick_epsilon: float | None = None
    """Attention stops where less of every stick is left; None: 2**-24, and 0 (never) in float64."""

    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    moe_pdrop: float = 0.0
    """Dropout inside the gate network, for ``"mlp"``."""
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    """Standard deviation of initial linear and embedding weights."""
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    """Ends a sequence; several where each of them does."""

    def __post_init__(self) -> None:
        for name in _PER_LAYER_FIELDS:
            value = getattr(self, name)
            if isinstance(value, Sequence):
                object.__setattr__(self, name, tuple(value))
                if len(value) != self.n_layer:
                    self._reject(name, f"one number or one per layer ({self.n_layer})", value)
        self._check_numbers()
        self._check_names()
        self._check_experts()
        if self.att_hidden % self.n_head:
            self._reject("att_hidden", f"a multiple of n_head ({self.n_head})", self.att_hidden)
        for k_name, experts_name in (("k_att", "n_att_experts"), ("k_mlp", "n_mlp_experts")):
            k, fewest = getattr(self, k_name), min(self.per_layer(experts_name))
            if k > fewest:
                self._reject(k_name, f"at most {experts_name} ({fewest})", k)
        if not 0 <= self.sample_topk <= min(self.k_att, self.k_mlp):
            self._reject("sample_topk", f"in [0, {min(self.k_att, self.k_mlp)}] (k_att and k_mlp)", self.sample_topk)

    def _reject(self, name: str, expected: str, value: object) -> None:
        raise ValueError(f"MoLMConfig: {name} must be {expected}, got {value!r}")

    def per_layer(self, name: str) -> tuple[int, ...]:
        """A field that is one number or one per layer, as one per layer."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * self.n_layer

    def _check_numbers(self) -> None:
        sizes = ("vocab_size", "n_embd", "n_layer", "n_head", "att_hidden", "ffd_hidden", "k_att", "k_mlp")
        for name in (*sizes, "gating_size", "block_size"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                self._reject(name, "a positive integer", getattr(self, name))
        for name in ("n_att_experts", "n_mlp_experts"):
            if not all(_is_int(n) and n >= 1 for n in self.per_layer(name)):
                self._reject(name, "positive integers", getattr(self, name))
        for name in _PER_LAYER_FIELDS[2:]:
            if not all(_is_int(n) and n >= 0 for n in self.per_layer(name)):
                self._reject(name, "non-negative integers", getattr(self, name))
        for name in ("sample_topk", "history_length"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 0:
                self._reject(name, "a non-negative integer", getattr(self, name))
        for name in ("resid_pdrop", "embd_pdrop", "moe_pdrop"):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1):
                self._reject(name, "in [0, 1)", getattr(self, name))
        if not (_is_number(self.layer_norm_epsilon) and self.layer_norm_epsilon > 0):
            self._reject("layer_norm_epsilon", "positive", self.layer_norm_epsilon)
        for name in ("aux_loss_weight", "initializer_range", "stick_epsilon"):
            value = getattr(self, name)
            unset = name == "stick_epsilon" and value is None
            if not unset and not (_is_number(value) and math.isfinite(value) and value >= 0):
                self._reject(name, "finite and non-negative", value)
        if not isinstance(self.tie_word_embeddings, bool):
            self._reject("tie_word_embeddings", "true or false", self.tie_word_embeddings)
        if isinstance(self.eos_token_id, Sequence):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = isinstance(value, tuple) and name == "eos_token_id"
            if value is not None and not all(_is_int(token) for token in (value if several else (value,))):
                self._reject(name, "None or an integer" + " or several" * (name == "eos_token_id"), value)

    def _check_experts(self) -> None:
        for kind in ("att", "mlp"):
            experts = self.per_layer(f"n_{kind}_experts")
            if any(new > n for new, n in zip(self.per_layer(f"n_new_{kind}_experts"), experts, strict=True)):
                self._reject(
                    f"n_new_{kind}_experts", f"at most n_{kind}_experts", getattr(self, f"n_new_{kind}_experts")
                )
            if self.router_order != "softmax_topk" and any(self.per_layer(f"{kind}_normaliser_rows")):
                name = f"{kind}_normaliser_rows"
                self._reject(name, f"0 with router_order {self.router_order!r}", getattr(self, name))
            self._check_places(f"{kind}_expert_places", experts)

    def _check_places(self, name: str, experts: Sequence[int]) -> None:
        places = getattr(self, name)
        if places is None:
            return
        object.__setattr__(self, name, tuple(tuple(layer) for layer in places))
        if len(places) != self.n_layer:
            self._reject(name, f"None or one list per layer ({self.n_layer})", places)
        for layer, n in zip(places, experts, strict=True):
            if sorted(place for place in layer if place != -1) != list(range(n)):
                self._reject(name, f"-1 or each of 0 to {n - 1} once", layer)

    def _check_names(self) -> None:
        for name, known in (
            ("activation_function", tuple(ACTIVATIONS)),
            ("gate_type", GATE_TYPES),
            ("router_order", ROUTER_ORDERS),
            ("aux_loss_type", AUX_LOSS_TYPES),
        ):
            if getattr(self, name) not in known:
                self._reject(name, f"one of {', '.join(known)}", getattr(self, name))

    @property
    def att_experts(self) -> tuple[int, ...]:
        """Attention experts of each layer."""
        return self.per_layer("n_att_experts")

    @property
    def mlp_experts(self) -> tuple[int, ...]:
        """Feed-forward experts of each layer."""
        return self.per_layer("n_mlp_experts")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MoLMConfig:
        """A named configuration, with some fields changed. ``PRESETS`` has the names."""
        from moduleformer_ext.models.presets import PRESETS

        if name not in PRESETS:
            raise ValueError(f"MoLMConfig: preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], **changes})

    def replace(self, **changes: Any) -> MoLMConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MoLMConfig:
        """The inverse of :meth:`to_dict`; absent fields take their defaults, unknown ones are an error."""
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"MoLMConfig: unknown fields {', '.join(unknown)}")
        return cls(**fields)

    @classmethod
    def from_reference(cls, fields: Mapping[str, Any]) -> MoLMConfig:
        """Read the configuration of a published MoLM; see
        :func:`moduleformer_ext.models.convert.config_from_reference`.
        """
        from moduleformer_ext.models.convert import config_from_reference

        return config_from_reference(fields)

    def to_reference(self) -> dict[str, Any]:
        """The inverse of :meth:`from_reference`; see :func:`moduleformer_ext.models.convert.config_to_reference`."""
        from moduleformer_ext.models.convert import config_to_reference

        return config_to_reference(self)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
