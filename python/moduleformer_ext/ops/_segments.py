from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moduleformer_ext.types import Segments


def segments(op: str, argument: str, value: Segments) -> list[Tensor]:
    """The tensors of a parameter with an expert dimension."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (Sequence, nn.ParameterList)) and all(isinstance(segment, Tensor) for segment in value):
        return list(value)
    raise ValueError(f"{op}: {argument} must be a tensor or a sequence of tensors, got {type(value).__name__}")


def joined(op: str, argument: str, value: Segments | None) -> Tensor | None:
    """One tensor, for what is small."""
    if value is None or isinstance(value, Tensor):
        return value
    found = segments(op, argument, value)
    for part in found:
        check_dense(op, argument, part)
    kinds = {(part.dtype, part.device, *part.shape[1:]) for part in found if part.dim()}
    if len(kinds) != 1 or not all(part.dim() for part in found):
        shapes = ", ".join(f"{part.dtype} {list(part.shape)} on {part.device}" for part in found) or "none"
        raise ValueError(f"{op}: {argument} must have segments that agree in all but their experts, got {shapes}")
    return torch.cat(found)


def check_dense(op: str, argument: str, tensor: Tensor) -> None:
    """What csrc/bindings/op.cpp says of such tensors, for one that is computed with before an operator sees it."""
    if tensor.is_nested:
        kind = "a nested one"
    elif tensor.layout != torch.strided:
        kind = f"layout {tensor.layout}"
    elif tensor.is_quantized:
        kind = f"a quantized one ({tensor.dtype})"
    else:
        return
    raise ValueError(f"{op}: {argument} must be a dense tensor with strides, got {kind}")
