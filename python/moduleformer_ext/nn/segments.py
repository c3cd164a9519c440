"""Parameters with an expert dimension, cut in two so that old experts can be frozen while new ones train.

The kernels take both segments as they are and do no weight-gradient work for one that does not require a gradient.
In a state dict the parameter stays whole, under its own name: files know nothing of segments.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moduleformer_ext.nn.plain import is_readable
from moduleformer_ext.types import Segments

__all__ = ["join_in_state", "join_parameter", "segments_of", "split_parameter", "whole_name"]


def segments_of(module: nn.Module, name: str) -> Segments:
    """The parameter as the ops take it: whole, or its two segments.

    Raises:
        TypeError: it is quantised, which the kernels cannot read.
    """
    whole: Tensor | None = getattr(module, name)
    if whole is not None and not is_readable(whole):
        raise TypeError(
            f"{type(module).__name__}: {name} must be a plain tensor, got {type(whole).__name__}; quantise or wrap "
            "linear layers alone"
        )
    return (getattr(module, f"{name}_old"), getattr(module, f"{name}_new")) if whole is None else whole


def split_parameter(module: nn.Module, name: str, at: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Replace the parameter by `{name}_old`, its first `at` experts, and `{name}_new`, the others."""
    whole = module.get_parameter(name)
    old = nn.Parameter(whole.detach()[:at].clone(), requires_grad=whole.requires_grad)
    new = nn.Parameter(whole.detach()[at:].clone(), requires_grad=whole.requires_grad)
    module.register_parameter(name, None)
    module.register_parameter(f"{name}_old", old)
    module.register_parameter(f"{name}_new", new)
    hooks = (
        module.register_state_dict_post_hook(partial(_join_in_state, name=name)),
        module.register_load_state_dict_pre_hook(partial(_split_in_state, name=name)),
    )
    setattr(module, f"_{name}_hooks", hooks)
    return old, new


def join_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """Undo :func:`split_parameter`; the whole requires a gradient."""
    whole = nn.Parameter(torch.cat([getattr(module, f"{name}_old").detach(), getattr(module, f"{name}_new").detach()]))
    for hook in getattr(module, f"_{name}_hooks"):
        hook.remove()
    delattr(module, f"_{name}_hooks")
    for part in ("old", "new"):
        delattr(module, f"{name}_{part}")
    module.register_parameter(name, whole)
    return whole


def whole_name(name: str) -> str:
    """The name, in a state dict, of the parameter whose segment has this name; other names are their own."""
    return name.removesuffix("_old").removesuffix("_new")


def join_in_state(state: dict[str, Tensor], name: str) -> None:
    """Put the whole parameter in the place of its two segments."""
    state[name] = torch.cat([state.pop(f"{name}_old"), state.pop(f"{name}_new")])


def _join_in_state(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object, *, name: str) -> None:
    if f"{prefix}{name}_old" not in state or f"{prefix}{name}_new" not in state:
        raise ValueError(f"split_parameter: the segments of {prefix}{name} must be plain parameters, got a wrapped one")
    join_in_state(state, f"{prefix}{name}")


def _split_in_state(module: nn.Module, state: dict[str, Tensor], prefix: str, *_arguments: Any, name: str) -> None:
    if (whole := state.pop(f"{prefix}{name}", None)) is not None:
        at = getattr(module, f"{name}_old").shape[0]
        state[f"{prefix}{name}_old"], state[f"{prefix}{name}_new"] = whole[:at], whole[at:]
