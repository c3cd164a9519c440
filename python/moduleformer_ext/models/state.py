"""A model's weights as files have them, whatever it is wrapped in while it lives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from moduleformer_ext.models.modeling import MoLMForCausalLM

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and checkpoint wrappers put into names."""


def canonical_state(model: MoLMForCausalLM) -> dict[str, Tensor]:
    """All weights, detached, under their published names: those of compiled and wrapped blocks, parametrised ones as
    they are computed, sharded ones whole (a collective operation). Where embeddings are tied there is no head.

    Raises:
        ValueError: something else than the configuration's weights, as adapters or a resized head; the message lists
            the tensors.
    """
    state = {}
    for name, tensor in (_stored(model) | _computed(model)).items():
        gather = getattr(tensor.detach(), "full_tensor", None)  # of a DTensor, whose import takes long
        state[_published(name)] = tensor.detach() if gather is None else gather()
    with torch.device("meta"):
        expected = MoLMForCausalLM(model.config).state_dict()
    check_fit(expected, state)
    if model.config.tie_word_embeddings:
        head, embedding = state.pop("lm_head.weight"), state["transformer.wte.weight"]
        if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
            raise ValueError(
                "the weights do not fit the configuration; lm_head.weight must be transformer.wte.weight with "
                "tie_word_embeddings, got another"
            )
    return state


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
        "not floating point": [
            f"{name} ({state[name].dtype})"
            for name in expected
            if name in state and not state[name].is_floating_point()
        ],
    }
    found = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError("the weights do not fit the configuration; tensors " + "; ".join(found))


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
