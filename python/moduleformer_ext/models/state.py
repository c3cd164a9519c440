"""A model's weights as files have them, whatever it is wrapped in while it lives; and back into a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from moduleformer_ext.models.config import MoLMConfig

if TYPE_CHECKING:
    from moduleformer_ext.models.modeling import MoLM, MoLMForCausalLM

Model = TypeVar("Model", "MoLM", "MoLMForCausalLM")

HEADS = ("lm_head.weight", "score.weight")
"""Of a language model, and of a classifier of sequences."""

_TIED = ("transformer.wte.weight", "lm_head.weight")
_LAYER = re.compile(r"(?:transformer\.)?h\.(\d+)\.")
_DROPPED_BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(mask|cum_weight)")
_ROUTER = ".gate."
_QUANTISED = (".values", ".scales")
"""Last parts of the names of quantised matrices, which have types of their own."""
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and checkpoint wrappers put into names."""


def canonical_state(model: MoLMForCausalLM, *, keep: bool = True) -> dict[str, Tensor]:
    """All weights, detached, under their published names: those of compiled and wrapped blocks, parametrised ones as
    they are computed, sharded ones whole (a collective operation). Where embeddings are tied there is no head. Without
    ``keep`` the tensors have no contents, on a process that does not need them.

    Raises:
        ValueError: something else than the configuration's weights, as adapters or a resized head; the message lists
            the tensors.
    """
    state = {}
    for name, tensor in (_stored(model) | _computed(model)).items():
        gather = getattr(tensor.detach(), "full_tensor", None)  # of a DTensor, whose import takes long
        whole = tensor.detach() if gather is None else gather()
        state[_published(name)] = whole if keep else whole.to("meta")
    with torch.device("meta"):
        expected = type(model)(model.config).state_dict()
    check_fit(expected, state)
    if model.config.tie_word_embeddings:
        _check_tied(state)
        del state["lm_head.weight"]
    return state


def _check_tied(state: Mapping[str, Tensor]) -> None:
    embedding, head = (state[name] for name in _TIED)
    if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
        raise ValueError(
            "the weights do not fit the configuration; lm_head.weight must be transformer.wte.weight with "
            "tie_word_embeddings, got another"
        )


def model_from_state(
    kind: type[Model],
    config: MoLMConfig,
    state_dict: Mapping[str, Tensor],
    *,
    copy: bool = True,
    dtype: torch.dtype | None = None,
) -> Model:
    """A model of ``config`` with exactly these weights, in evaluation mode.

    Args:
        kind: the class of the model.
        state_dict: all its tensors under their published names. Buffers of old checkpoints are skipped, and of tied
            embeddings one tensor is enough.
        copy: with False the model uses these very tensors.
        dtype: convert the weights; by default they keep the type they are stored in.

    Raises:
        ValueError: names are missing or unknown, or shapes do not match the configuration, or types differ; all
            tensors are listed. Or embeddings are tied, and head and embedding differ.
    """
    state = {name: tensor for name, tensor in state_dict.items() if not _DROPPED_BUFFERS.fullmatch(name)}
    if config.tie_word_embeddings:
        for name, other in (_TIED, _TIED[::-1]):
            if name in state:
                state.setdefault(other, state[name])
    _check_layers(config, state)
    with torch.device("meta"):
        model = kind(config)
    check_fit(model.state_dict(), state)
    if config.tie_word_embeddings:
        _check_tied(state)
    if dtype is not None:
        state = {name: tensor if name.endswith(_QUANTISED) else tensor.to(dtype) for name, tensor in state.items()}
    _check_types(state)
    if copy:
        state = {name: tensor.clone() for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that lists all tensors in which ``state`` differs from the names and shapes of a model."""
    problems = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "of the wrong shape": [
            f"{name} (expected {list(tensor.shape)}, got {list(state[name].shape)})"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
        "of the wrong type": [
            f"{name} (expected {_type(name, tensor)}, got {state[name].dtype})"
            for name, tensor in expected.items()
            if name in state and not _fits(name, tensor, state[name])
        ],
    }
    found = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError("the weights do not fit the configuration; tensors " + "; ".join(found))


def _type(name: str, expected: Tensor) -> str:
    return str(expected.dtype) if name.endswith(_QUANTISED) else "floating point"


def _fits(name: str, expected: Tensor, got: Tensor) -> bool:
    return got.dtype == expected.dtype if name.endswith(_QUANTISED) else got.is_floating_point()


def router_dtype(state: Mapping[str, Tensor]) -> str | None:
    """ "float32" if the routers are that and the other weights less precise: what config.json says of it."""
    routers = {tensor.dtype for name, tensor in state.items() if _ROUTER in name}
    others = {tensor.dtype for name, tensor in state.items() if _ROUTER not in name and not name.endswith(_QUANTISED)}
    return "float32" if routers == {torch.float32} and others <= {torch.bfloat16, torch.float16} else None


def _check_layers(config: MoLMConfig, state: Mapping[str, Tensor]) -> None:
    """A wrong number of layers is found before they are built, which would take minutes for a million."""
    layers = {match[1] for name in state if (match := _LAYER.match(name))}
    if config.n_layer > len(layers):
        raise ValueError(
            f"the weights do not fit the configuration; n_layer must be {len(layers)}, the number of layers with "
            f"tensors, got {config.n_layer}"
        )


def _check_types(state: Mapping[str, Tensor]) -> None:
    """Routers compute in their own precision; all else meets in the residual stream and must be of one type."""
    names: dict[torch.dtype, list[str]] = {}
    for name, tensor in state.items():
        if _ROUTER not in name and not name.endswith(_QUANTISED):
            names.setdefault(tensor.dtype, []).append(name)
    if len(names) > 1:
        found = "; ".join(f"{dtype}: {', '.join(of_type)}" for dtype, of_type in names.items())
        raise ValueError(
            f"the weights must be of one type outside of the routers (convert with dtype=...), got {found}"
        )


def _stored(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".parametrizations." not in name}


def _computed(model: nn.Module) -> dict[str, Tensor]:
    """Parametrised weights."""
    return {
        f"{path}.{name}": getattr(module, name)
        for path, module in model.named_modules()
        if is_parametrized(module)
        for name in module.parametrizations
    }


def _published(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
