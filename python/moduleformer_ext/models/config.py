"""The description of a model: everything but its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moduleformer_ext.models.activations import ACTIVATIONS
from moduleformer_ext.models.experts import PER_LAYER, PUBLISHED_NAMES, ExpertsConfig, flatten, split
from moduleformer_ext.models.presets import PRESETS
from moduleformer_ext.models.published import (
    MODEL_TYPE,
    OWN,
    fields_from_reference,
    fields_to_reference,
    is_own,
    without_aliases,
)
from moduleformer_ext.quantised import BITS

GATE_TYPES = ("mlp", "linear", "gmm")
ROUTER_ORDERS = ("softmax_topk", "topk_softmax")
_ATTENTION, _FFN = ExpertsConfig(hidden=512), ExpertsConfig(hidden=2048)
AUX_LOSS_TYPES = ("mi", "switch", "concentration", "none")


@dataclass(frozen=True, kw_only=True)
class MoLMConfig:
    """A ModuleFormer language model. Fields and defaults are those of the published configurations.

    Files and options have the fields of ``attention`` and ``ffn`` under their published names, and so do
    :meth:`preset`, :meth:`replace`, :meth:`to_dict` and :meth:`from_dict`: ``n_mlp_experts`` is ``ffn.num_experts``.

    Example:
        >>> config = MoLMConfig.preset("molm-4b-k2", block_size=1024, n_mlp_experts=64)
        >>> config.n_embd, config.n_layer, config.attention.k, config.ffn.num_experts
        (1024, 24, 2, 64)

    Raises:
        ValueError: a field is out of range or contradicts another; the message names it.
    """

    vocab_size: int = 50295
    n_embd: int = 1024
    """Width of the residual stream, D."""
    n_layer: int = 24
    n_head: int = 8
    """Heads of keys and values, and of each routed query."""
    attention: ExpertsConfig = _ATTENTION
    """Query and output experts. With ``n_head == 1`` and ``hidden == n_embd`` keys and values are the tokens."""
    ffn: ExpertsConfig = _FFN
    """Feed-forward experts."""
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

    block_size: int = 512
    """New tokens per training segment."""
    history_length: int = 512
    """Past tokens that a training segment attends to."""
    stick_epsilon: float | None = None
    """Attention stops where less of every stick is left; None: 2**-24, and 0 (never) in float64."""

    expert_bits: int | None = None
    """Experts as integers of 8 or 4 bits, for inference: see :func:`moduleformer_ext.models.quantise_experts`. None: as
    they were trained."""

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
        self._check_numbers()
        self._check_names()
        for kind in PUBLISHED_NAMES:
            self._check_experts(kind)
        if self.attention.hidden % self.n_head:
            self._reject("att_hidden", f"a multiple of n_head ({self.n_head})", self.attention.hidden)
        fewest = min(self.attention.k, self.ffn.k)
        if not 0 <= self.sample_topk <= fewest:
            self._reject("sample_topk", f"in [0, {fewest}] (k_att and k_mlp)", self.sample_topk)

    def _reject(self, name: str, expected: str, value: object) -> None:
        raise ValueError(f"MoLMConfig: {name} must be {expected}, got {value!r}")

    @property
    def identity_kv(self) -> bool:
        """Whether keys and values are the tokens themselves."""
        return self.n_head == 1 and self.attention.hidden == self.n_embd

    def num_experts(self, kind: str) -> tuple[int, ...]:
        """The experts of each layer; ``kind`` is ``"attention"`` or ``"ffn"``."""
        return tuple(getattr(self, kind).in_layer("num_experts", layer) for layer in range(self.n_layer))

    def require_whole_experts(self, op: str) -> None:
        """Raise a ValueError, in the name of what needs the experts' weights, where they are quantised."""
        if self.expert_bits is not None:
            raise ValueError(
                f"{op}: expert_bits must be None, got {self.expert_bits}; take the model that it was made from"
            )

    def _check_numbers(self) -> None:
        for name in ("vocab_size", "n_embd", "n_layer", "n_head", "gating_size", "block_size"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                self._reject(name, "a positive integer", getattr(self, name))
        for name in ("sample_topk", "history_length"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 0:
                self._reject(name, "a non-negative integer", getattr(self, name))
        for name in ("resid_pdrop", "embd_pdrop", "moe_pdrop", "stick_epsilon"):
            value = getattr(self, name)
            unset = name == "stick_epsilon" and value is None
            if not unset and not (_is_number(value) and 0 <= value < 1):
                self._reject(name, "in [0, 1)", value)
        if not (_is_number(self.layer_norm_epsilon) and self.layer_norm_epsilon > 0):
            self._reject("layer_norm_epsilon", "positive", self.layer_norm_epsilon)
        for name in ("aux_loss_weight", "initializer_range"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value) and value >= 0):
                self._reject(name, "finite and non-negative", value)
        if self.expert_bits is not None and self.expert_bits not in BITS:
            self._reject("expert_bits", "None, 8 or 4", self.expert_bits)
        if not isinstance(self.tie_word_embeddings, bool):
            self._reject("tie_word_embeddings", "true or false", self.tie_word_embeddings)
        if isinstance(self.eos_token_id, Sequence):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = isinstance(value, tuple) and name == "eos_token_id"
            if value is not None and not all(_is_int(token) for token in (value if several else (value,))):
                self._reject(name, "None or an integer" + " or several" * (name == "eos_token_id"), value)

    def _check_experts(self, kind: str) -> None:
        experts: ExpertsConfig = getattr(self, kind)
        names = PUBLISHED_NAMES[kind]

        def reject(name: str, expected: str, value: object = None) -> None:
            self._reject(names[name], expected, getattr(experts, name) if value is None else value)

        for name in ("hidden", "k"):
            if not _is_int(getattr(experts, name)) or getattr(experts, name) < 1:
                reject(name, "a positive integer")
        for name in PER_LAYER:
            value = getattr(experts, name)
            if isinstance(value, tuple) and len(value) != self.n_layer:
                reject(name, f"one number or one per layer ({self.n_layer})")
            least, expected = (1, "positive") if name == "num_experts" else (0, "non-negative")
            if not all(_is_int(n) and n >= least for n in (value if isinstance(value, tuple) else (value,))):
                reject(name, f"{expected} integers")
        numbers = self.num_experts(kind)
        if experts.k > min(numbers):
            reject("k", f"at most {names['num_experts']} ({min(numbers)})")
        if any(experts.in_layer("num_new", layer) > n for layer, n in enumerate(numbers)):
            reject("num_new", f"at most {names['num_experts']}")
        has_rows = any(experts.in_layer("normaliser_rows", layer) for layer in range(self.n_layer))
        if has_rows and self.router_order != "softmax_topk":
            reject("normaliser_rows", f"0 with router_order {self.router_order!r}")
        if experts.places is not None:
            layers = experts.places if isinstance(experts.places, tuple) else ()
            if len(layers) != self.n_layer or not all(isinstance(places, tuple) for places in layers):
                reject("places", f"None or one list per layer ({self.n_layer})")
            for places, n in zip(layers, numbers, strict=True):
                if not all(map(_is_int, places)) or sorted(p for p in places if p != -1) != list(range(n)):
                    reject("places", f"-1 or each of 0 to {n - 1} once", places)

    def _check_names(self) -> None:
        for name, known in (
            ("activation_function", tuple(ACTIVATIONS)),
            ("gate_type", GATE_TYPES),
            ("router_order", ROUTER_ORDERS),
            ("aux_loss_type", AUX_LOSS_TYPES),
        ):
            if getattr(self, name) not in known:
                self._reject(name, f"one of {', '.join(known)}", getattr(self, name))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MoLMConfig:
        """A named configuration, with some fields changed. ``PRESETS`` has the names."""
        if name not in PRESETS:
            raise ValueError(f"MoLMConfig: preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], **changes})

    def replace(self, **changes: Any) -> MoLMConfig:
        """A copy with some fields changed."""
        of_experts, others = split(changes)
        for kind, fields in of_experts.items():
            if fields:
                others[kind] = dataclasses.replace(others.get(kind, getattr(self, kind)), **fields)
        return dataclasses.replace(self, **others)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            fields |= flatten(field.name, value) if field.name in PUBLISHED_NAMES else {field.name: value}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MoLMConfig:
        """The inverse of :meth:`to_dict`; absent fields take their defaults, unknown ones are an error."""
        default = cls()
        if unknown := sorted(fields.keys() - default.to_dict().keys()):
            raise ValueError(f"MoLMConfig: unknown fields {', '.join(unknown)}")
        return default.replace(**fields)

    @classmethod
    def from_reference(cls, fields: Mapping[str, Any]) -> MoLMConfig:
        """Read a config.json: of a published MoLM, see
        :func:`moduleformer_ext.models.published.fields_from_reference`, or as :meth:`to_file` writes it.

        Raises:
            ValueError: it is another kind of model's, or a field is wrong; the message names it.
        """
        if (kind := fields.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
            raise ValueError(f"from_reference: model_type must be {MODEL_TYPE!r}, got {kind!r}")
        if is_own(fields):
            known = without_aliases(fields)
            return cls.from_dict({name: known[name] for name in cls().to_dict() if name in known})
        return cls.from_dict(fields_from_reference(fields))

    def to_file(self) -> dict[str, Any]:
        """The config.json of our own directories: all fields, and what tells others which model they describe."""
        return {**OWN, **self.to_dict()}

    def to_reference(self) -> dict[str, Any]:
        """The inverse of :meth:`from_reference`; see :func:`moduleformer_ext.models.published.fields_to_reference`."""
        return fields_to_reference(self)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
