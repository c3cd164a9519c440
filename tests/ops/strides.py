"""Tensors that lie where vector loads do not expect them."""

import torch
from torch import Tensor


def spaced(tensor: Tensor, dim: int, gap: int = 1) -> Tensor:
    """The same values, the slices along ``dim`` `gap` elements farther apart than they need be, NaN in between.

    Where a slice is a multiple of 16 bytes long, only the first one begins at a multiple of 16 bytes.
    """
    slices = tensor.movedim(dim, 0)
    space = tensor.new_full((slices.shape[0], slices[0].numel() + gap), torch.nan)
    return space[:, :-gap].unflatten(1, slices.shape[1:]).copy_(slices).movedim(0, dim)
