"""Dense projection of one or a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moduleformer_ext._extension import build_info

SERVES_CPU = build_info()["cuda_dispatch"] != "CPU"
"""False on the emulated device, whose CUDA kernels serve CPU tensors: there are none of this op."""

SLOW_IN_TORCH = frozenset(getattr(torch, name) for name in str(build_info()["slow_in_torch"]).split())
"""Types whose dense products take several times as long as float32's in torch, on the CPU of this machine."""


def linear_decode(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b, as fast as W can be read from memory: :func:`torch.nn.functional.linear` for generation.

    Sums are carried in float32 (float64 for float64) and rounded once. A row's result depends neither on the other
    rows nor on the number of threads. Meant for up to some eight rows: beyond, a blocked matrix product is faster.
    There is no gradient, and on a GPU no kernel: ``F.linear`` has both.

    Args:
        x: ``[..., in]`` on the CPU; float32, float64, bfloat16 or float16.
        weight: ``[out, in]``, contiguous, of x's dtype.
        bias: ``[out]``, of x's dtype, or None.

    Returns:
        ``[..., out]`` in x's dtype.

    Raises:
        ValueError: for another shape, dtype, device or stride, and in grad mode for an input that requires grad.
    """
    return torch.ops.moduleformer_ext.linear_decode(x, weight, bias)
