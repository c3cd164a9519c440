"""To and from the published format of MoLM: its configuration, and its names for the weights.

Parameters have the same names and shapes here, so that converting weights is checking them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moduleformer_ext.models.config import ACTIVATIONS, MoLMConfig
from moduleformer_ext.models.modeling import MoLM, MoLMForCausalLM
from moduleformer_ext.models.state import canonical_state, check_fit

Module = TypeVar("Module", bound=nn.Module)

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

_ALIASES = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
_LAYER_NORM_EPSILON = 1e-5
_HEADS = {"lm_head.weight", "score.weight"}  # of a language model, of a classifier of sequences
_TIED = ("transformer.wte.weight", "lm_head.weight")
_LAYER = re.compile(r"(?:transformer\.)?h\.(\d+)\.")
_DROPPED_BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(mask|cum_weight)")


def config_from_reference(fields: Mapping[str, Any]) -> MoLMConfig:
    """Read a published config.json.

    Absent fields take the published defaults, and fields of the surrounding framework are skipped. Two fields had no
    effect in the published implementation and have none here: ``layer_norm_epsilon`` (it is 1e-5) and ``attn_pdrop``.
    """
    own = {alias: fields[name] for name, alias in _ALIASES.items() if name in fields}
    own |= {name: fields[name] for name in _SHARED_DEFAULTS if name in fields}
    if own.get("aux_loss_type", "mi") != "mi":
        own["aux_loss_type"] = "switch"  # what the published implementation understands by any other name
    return MoLMConfig(**{**_SHARED_DEFAULTS, **own}, layer_norm_epsilon=_LAYER_NORM_EPSILON)


def config_to_reference(config: MoLMConfig) -> dict[str, Any]:
    """The config.json of the published format.

    The losses ``"concentration"`` and ``"none"`` have no name there; they do not change what the model computes, so
    that they are written as ``"mi"`` with weight 0. Which experts were inserted or pruned is not recorded there.

    Raises:
    ValueError: the model has something that the format cannot say; the message names the field.
    """

    def reject(name: str, expected: str, value: object) -> None:
        raise ValueError(f"config_to_reference: {name} must be {expected} in the published format, got {value!r}")

    for name in ("att_normaliser_rows", "mlp_normaliser_rows"):
        if any(config.per_layer(name)):
            reject(name, "0", getattr(config, name))
    fields = {name: getattr(config, name) for name in _SHARED_DEFAULTS}
    for name in ("n_att_experts", "n_mlp_experts"):
        value = fields[name]
        if isinstance(value, tuple):
            if len(set(value)) != 1:
                reject(name, "the same in every layer", value)
            fields[name] = value[0]
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
        "model_type": "moduleformer",
        "architectures": ["ModuleFormerForCausalLM"],
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "attn_pdrop": 0.0,
        "use_cache": True,
        **fields,
    }


_PUBLISHED_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def from_reference(
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    *,
    copy: bool = True,
    dtype: torch.dtype | None = None,
) -> MoLMForCausalLM:
    """A model with the weights of a published checkpoint.

    Args:
        config: the fields of its config.json.
        state_dict: all its tensors. The attention buffers ``mask`` and ``cum_weight`` are not needed and may be
            absent, and so may one of the two tensors of tied embeddings.
        copy: with False the model uses these very tensors.
        dtype: convert the weights; by default they keep the type they are stored in.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: names are missing or unknown, or shapes do not match the configuration, or types differ; all
            tensors are listed.
    """
    return model_from_state(MoLMConfig.from_reference(config), state_dict, copy=copy, dtype=dtype)


def backbone_from_reference(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, copy: bool = True) -> MoLM:
    """The model below the head of a published checkpoint, which may be a classifier's (``score.weight``).

    Arguments, result and errors are those of :func:`from_reference`; the head stays in ``state_dict``.
    """
    prefix = "transformer."
    state = {name.removeprefix(prefix): tensor for name, tensor in _wanted(state_dict).items() if name not in _HEADS}
    own = MoLMConfig.from_reference(config)
    _check_layers(own, state)
    with torch.device("meta"):
        model = MoLM(own)
    return _assign(model, state, copy).eval()


def to_reference(model: MoLMForCausalLM) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, state dict) of the published format; see :func:`~moduleformer_ext.models.state.canonical_state`.

    The tensors are the model's own, detached, and with tied embeddings the head is there too.
    """
    state = canonical_state(model)
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    return config_to_reference(model.config), state


def model_from_state(
    config: MoLMConfig,
    state_dict: Mapping[str, Tensor],
    *,
    copy: bool = True,
    dtype: torch.dtype | None = None,
) -> MoLMForCausalLM:
    """The model of ``config`` with exactly these weights; see :func:`from_reference` for arguments and errors."""
    state = _wanted(state_dict)
    if "score.weight" in state and "lm_head.weight" not in state:
        raise ValueError(
            "from_reference: state_dict must hold a language model, got a sequence classifier's (score.weight and no "
            "lm_head.weight); MoLM.from_reference reads the model below that head, a Linear without bias on "
            "last_hidden_state"
        )
    if config.tie_word_embeddings:
        for name, other in (_TIED, _TIED[::-1]):
            if name in state:
                state.setdefault(other, state[name])
    _check_layers(config, state)
    with torch.device("meta"):
        model = MoLMForCausalLM(config)
    _assign(model, state, copy, dtype)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model.eval()


def _wanted(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if not _DROPPED_BUFFERS.fullmatch(name)}


def _check_layers(config: MoLMConfig, state: Mapping[str, Tensor]) -> None:
    """A wrong number of layers is found before they are built, which would take minutes for a million."""
    layers = {match[1] for name in state if (match := _LAYER.match(name))}
    if config.n_layer > len(layers):
        raise ValueError(
            f"the weights do not fit the configuration; n_layer must be {len(layers)}, the number of layers with "
            f"tensors, got {config.n_layer}"
        )


def _assign(model: Module, state: dict[str, Tensor], copy: bool, dtype: torch.dtype | None = None) -> Module:
    check_fit(model.state_dict(), state)
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    _check_types(state)
    if copy:
        state = {name: tensor.clone() for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model


def _check_types(state: Mapping[str, Tensor]) -> None:
    """Routers compute in their own precision; all else meets in the residual stream and must be of one type."""
    names: dict[torch.dtype, list[str]] = {}
    for name, tensor in state.items():
        if ".gate." not in name:
            names.setdefault(tensor.dtype, []).append(name)
    if len(names) > 1:
        found = "; ".join(f"{dtype}: {', '.join(of_type)}" for dtype, of_type in names.items())
        raise ValueError(
            f"the weights must be of one type outside of the routers (convert with dtype=...), got {found}"
        )
