"""Cross-entropy behind a dense projection, without the logits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """-log softmax(x W^T)[target], as ``cross_entropy(linear(x, weight).float(), target)`` without the logits.

    Logits are made for a chunk of rows at a time, which takes less memory than W (or 16 MiB, if that is more), and
    gradients with them, so that the work is that of the plain form: three products forward and backward. Losses and
    softmax are float32 (float64 for float64); products are rounded to x's dtype where the plain form rounds them.
    Differentiable once in x and weight.

    With ``reduction="none"``, and in float16, backward computes the logits again: four products.

    Args:
        x: ``[..., D]``, float32, float64, bfloat16 or float16.
        weight: ``[V, D]``, of x's dtype and device.
        target: ``[...]`` int64, in [0, V) or ``ignore_index``. On a GPU torch asserts it there.
        ignore_index: rows of this target have loss 0, no gradient, and no part in the mean.
        reduction: the mean over counted rows (NaN if there are none), the sum, or a loss for each row.
        z_loss: adds z_loss · logsumexp(logits)² to each counted row's loss, which keeps logits from drifting
            (Chowdhery et al. 2022, PaLM, section 5); from 0 to 1e38.

    Returns:
        ``[]``, or ``[...]`` for "none", in float32 (float64 for float64).

    Raises:
        ValueError: for another shape, dtype, device, reduction or z_loss, or on the CPU a target out of range.
        NotImplementedError: for a second derivative or forward mode.
    """
    return torch.ops.moduleformer_ext.linear_cross_entropy(x, weight, target, ignore_index, reduction, z_loss)
