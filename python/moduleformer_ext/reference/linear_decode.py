"""Plain-PyTorch twin of :mod:`moduleformer_ext.ops.linear_decode`."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_decode(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.to(wide).t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
