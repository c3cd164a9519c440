"""A dense layer that generation does not wait for."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduleformer_ext import ops
from moduleformer_ext.nn.plain import has_plain_weight, is_plain
from moduleformer_ext.ops.linear_decode import SERVES_CPU

MOST_ROWS = 8
"""Up to so many tokens :func:`moduleformer_ext.ops.linear_decode` is faster than a matrix product."""


class Linear(nn.Linear):
    """:class:`torch.nn.Linear`, whose products with a few rows on the CPU run at the speed of memory where no gradient
    is asked for.
    """

    def forward(self, input: Tensor) -> Tensor:
        # The size last: an exported graph with gradients shall not depend on it.
        served = SERVES_CPU and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        served = served and input.device.type == "cpu" and has_plain_weight(self)
        if served and input.numel() <= MOST_ROWS * self.in_features:
            return ops.linear_decode(input, self.weight, self.bias)
        return super().forward(input)


def head_cross_entropy(
    head: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Cross-entropy of head(x) [..., V] against target [...], in float32 at least.

    Logits are never held as a whole where the head is no more than a weight; any other head is called.
    """
    if is_plain(head, Linear) and head.bias is None:
        weight = cast(Tensor, head.weight)
        return ops.linear_cross_entropy(x, weight, target, ignore_index=ignore_index, reduction=reduction)
    logits = head(x).flatten(0, -2)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, target.flatten(), ignore_index=ignore_index, reduction=reduction)
