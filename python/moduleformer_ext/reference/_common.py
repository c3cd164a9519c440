from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from moduleformer_ext.types import Segments

P = ParamSpec("P")
R = TypeVar("R")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are carried: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def joined(weight: Segments) -> Tensor:
    """One tensor along the expert dimension."""
    return weight if isinstance(weight, Tensor) else torch.cat(tuple(weight))


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Autocast would round sums that these functions carry in float32."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return wrapper
