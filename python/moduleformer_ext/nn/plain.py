"""Whether a kernel may read a module's weights instead of calling the module.

Adapters, hooks, offloading and quantisation change what a module computes without changing its weights: a module that
any of them has touched is called. Parametrised weights are read as attributes, so that they are what they should be.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["call_in_dtype_of_input", "has_plain_weight", "is_plain", "is_readable", "plain_layers"]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module would do what ``kind.forward`` does with its weights, and nothing else."""
    return _is_untouched(module, kind) and not _has_any_global_hook()


def plain_layers(sequence: nn.Sequential, *kinds: type[nn.Module]) -> list[nn.Module] | None:
    """The modules of a sequence if it and all of them are plain and of these kinds."""
    layers = [layer for layer in sequence._modules.values() if layer is not None]
    if len(layers) != len(kinds) or not is_plain(sequence, nn.Sequential):
        return None
    for layer, kind in zip(layers, kinds, strict=True):
        if not _is_untouched(layer, kind):
            return None
    return layers


def _is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """:func:`is_plain`, the hooks of all modules aside."""
    own, cls = module.__dict__, type(module)
    return (
        (cls is kind or cls.forward is kind.forward)
        and not (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own  # replaced on the instance, as offloading does
        )
        and has_plain_weight(module)
    )


def has_plain_weight(module: nn.Module) -> bool:
    """False for weights that are quantised: they know their own products."""
    parameters = module._parameters
    if not parameters:
        return True
    weight = parameters.get("weight")
    return weight is None or is_readable(weight)


def is_readable(weight: Tensor) -> bool:
    """Whether the ops take it: plain tensors, and DTensors, whose class takes long to import."""
    return type(weight) is nn.Parameter or not is_traceable_wrapper_subclass(weight) or hasattr(weight, "full_tensor")


def call_in_dtype_of_input(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) computed in the dtype of x where the module is a plain linear layer; any other is called in its own."""
    if is_plain(module, nn.Linear):
        module = cast(nn.Linear, module)
        bias = module.bias
        return F.linear(x, module.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)
    return module(x.to(dtype)).to(x.dtype)
