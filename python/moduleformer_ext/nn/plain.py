"""Whether a kernel may read a module's weights instead of calling the module.

Adapters, hooks, offloading and quantisation change what a module computes without changing its weights: a module that
any of them has touched is called. Parametrised weights are read as attributes, so that they are what they should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import eq, is_
from typing import TypeGuard, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "Untouched",
    "call_in_dtype_of_input",
    "has_plain_weight",
    "is_plain",
    "is_readable",
    "is_untouched",
    "plain_layers",
]


_Kind = TypeVar("_Kind", bound=nn.Module)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_TABLES = ("_modules", "_parameters", "_buffers")


def is_plain(module: nn.Module, kind: type[_Kind]) -> TypeGuard[_Kind]:
    """Whether calling the module would do what ``kind.forward`` does with its weights, and nothing else."""
    return is_untouched(module, kind) and not _has_any_global_hook()


class Untouched:
    """Tells quickly whether the modules inside of one are still as they were when they were found plain: the same
    objects of the same classes with the same children, parameters and buffers, nothing hooked to them and nothing set
    on them.
    """

    def __init__(self, modules: Sequence[nn.Module], root: nn.Module) -> None:
        self._modules = modules
        self._classes = [type(module) for module in modules]
        self._attributes = [module.__dict__ for module in modules]
        self._number_of_attributes = [len(own) for own in self._attributes]
        self._hooks = [own[hooks] for own in self._attributes for hooks in _HOOKS]
        tables = [root._modules, *(own[table] for own in self._attributes for table in _TABLES)]
        self._tables = [table for table in tables if table]
        self._contents = list(chain.from_iterable(map(dict.values, self._tables)))

    def holds(self) -> bool:
        """All of it in C, without a Python frame per module: it is asked for every token."""
        return (
            not any(self._hooks)
            and all(map(is_, map(type, self._modules), self._classes))
            and all(map(eq, map(len, self._attributes), self._number_of_attributes))
            and sum(map(len, self._tables)) == len(self._contents)
            and all(map(is_, chain.from_iterable(map(dict.values, self._tables)), self._contents))
        )


def plain_layers(sequence: nn.Sequential, *kinds: type[nn.Module]) -> list[nn.Module] | None:
    """The modules of a sequence if it and all of them are plain and of these kinds."""
    layers = [layer for layer in sequence._modules.values() if layer is not None]
    if len(layers) != len(kinds) or not is_plain(sequence, nn.Sequential):
        return None
    for layer, kind in zip(layers, kinds, strict=True):
        if not is_untouched(layer, kind):
            return None
    return layers


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """:func:`is_plain`, the hooks of all modules aside."""
    own, cls = module.__dict__, type(module)
    return (
        (cls is kind or cls.forward is kind.forward)
        and not any(map(own.__getitem__, _HOOKS))
        and "forward" not in own  # replaced on the instance, as offloading does
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
        bias = module.bias
        return F.linear(x, module.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)
    return module(x.to(dtype)).to(x.dtype)
