"""The published configuration of MoLM: its config.json. Weights have the same names and shapes there as here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moduleformer_ext.models.activations import ACTIVATIONS
from moduleformer_ext.models.experts import PUBLISHED_NAMES

if TYPE_CHECKING:
    from moduleformer_ext.models.config import MoLMConfig

MODEL_TYPE = "moduleformer"
FORMAT = "moduleformer_ext"
OWN: Mapping[str, Any] = {
    "model_type": MODEL_TYPE,
    "architectures": ["ModuleFormerForCausalLM"],
    "format": FORMAT,
}
"""What a config.json of ours holds beside the fields of a MoLMConfig, every one of which it has."""


def is_own(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json says all that a MoLMConfig does."""
    return fields.get("format") == FORMAT


_SHARED_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50295,
    "block_size": 512,
    "history_length": 512,
    "n_embd": 1024,
    "n_layer": 24,
    "n_head": 8,
    "att_hidden": 512,
    "ffd_hidden": 2048,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "moe_pdrop": 0.0,
    "sample_topk": 0,
    "gating_size": 256,
    "n_att_experts": 32,
    "k_att": 2,
    "n_mlp_experts": 32,
    "k_mlp": 2,
    "initializer_range": 0.02,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "tie_word_embeddings": False,
    "aux_loss_type": "mi",
    "aux_loss_weight": 0,
    "gate_type": "mlp",
}
"""Fields that mean the same in both formats, with what a published config.json leaves out."""

ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "ffd_hidden",
    "hidden_act": "activation_function",
    "num_experts": "n_mlp_experts",
    "num_local_experts": "n_mlp_experts",
    "num_experts_per_tok": "k_mlp",
    "router_aux_loss_coef": "aux_loss_weight",
}
"""What transformers calls fields that have other names here."""
_LAYER_NORM_EPSILON = 1e-5


def without_aliases(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields under their own names.

    Raises:
        ValueError: two names of one field that do not agree.
    """
    own: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, value in fields.items():
        target = ALIASES.get(name, name)
        if target in own and own[target] != value:
            raise ValueError(
                f"config.json: {names[target]} and {name} are names of one field and must agree, got {own[target]!r} "
                f"and {value!r}"
            )
        own[target], names[target] = value, name
    return own


def fields_from_reference(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a MoLMConfig in a published config.json.

    Absent fields take the published defaults, and fields of the surrounding framework are skipped. Two fields had no
    effect in the published implementation and have none here: ``layer_norm_epsilon`` (it is 1e-5) and ``attn_pdrop``.
    """
    fields = without_aliases(fields)
    own = {name: fields[name] for name in _SHARED_DEFAULTS if name in fields}
    if own.get("aux_loss_type", "mi") != "mi":
        own["aux_loss_type"] = "switch"  # what the published implementation understands by any other name
    return {**_SHARED_DEFAULTS, **own, "layer_norm_epsilon": _LAYER_NORM_EPSILON}


def fields_to_reference(config: MoLMConfig) -> dict[str, Any]:
    """The config.json of the published format.

    The losses ``"concentration"`` and ``"none"`` have no name there; they do not change what the model computes, so
    that they are written as ``"mi"`` with weight 0. Which experts were inserted or pruned is not recorded there.

    Raises:
        ValueError: the model has something that the format cannot say; the message names the field.
    """

    def reject(name: str, expected: str, value: object) -> None:
        raise ValueError(f"to_reference: {name} must be {expected} in the published format, got {value!r}")

    own = config.to_dict()
    fields = {name: own[name] for name in _SHARED_DEFAULTS}
    for kind, names in PUBLISHED_NAMES.items():
        rows, number = names["normaliser_rows"], names["num_experts"]
        if own[rows] and (isinstance(own[rows], int) or any(own[rows])):
            reject(rows, "0", own[rows])
        numbers = config.num_experts(kind)
        if len(set(numbers)) != 1:
            reject(number, "the same in every layer", numbers)
        fields[number] = numbers[0]
    if config.expert_bits is not None:
        reject("expert_bits", "None", config.expert_bits)
    if config.layer_norm_epsilon != _LAYER_NORM_EPSILON:
        reject("layer_norm_epsilon", str(_LAYER_NORM_EPSILON), config.layer_norm_epsilon)
    if config.router_order != "softmax_topk":
        reject("router_order", "'softmax_topk'", config.router_order)
    activation = ACTIVATIONS[config.activation_function]
    if activation not in _PUBLISHED_ACTIVATIONS:
        reject("activation_function", f"one of {', '.join(_PUBLISHED_ACTIVATIONS)}", config.activation_function)
    fields["activation_function"] = _PUBLISHED_ACTIVATIONS[activation]
    if config.aux_loss_type not in ("mi", "switch"):
        fields |= {"aux_loss_type": "mi", "aux_loss_weight": 0}
    return {
        "model_type": MODEL_TYPE,
        "architectures": OWN["architectures"],
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "attn_pdrop": 0.0,
        "use_cache": True,
        **fields,
    }


_PUBLISHED_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}
