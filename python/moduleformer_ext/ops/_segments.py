from collections.abc import Sequence

import torch
from torch import Tensor

from moduleformer_ext.types import Segments


def segments(op: str, argument: str, value: Segments) -> list[Tensor]:
    """The tensors of a parameter with an expert dimension."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Sequence) and all(isinstance(segment, Tensor) for segment in value):
        return list(value)
    raise ValueError(f"{op}: {argument} must be a tensor or a sequence of tensors, got {type(value).__name__}")


def joined(op: str, argument: str, value: Segments | None) -> Tensor | None:
    """One tensor, for what is small."""
    return value if value is None or isinstance(value, Tensor) else torch.cat(segments(op, argument, value))
