"""A dense layer that generation does not wait for, nor training in 16 bits."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moduleformer_ext import ops
from moduleformer_ext.nn.plain import has_plain_weight, is_plain
from moduleformer_ext.ops.linear_decode import SERVES_CPU, SLOW_IN_TORCH

MOST_ROWS = 8
"""Up to so many tokens :func:`moduleformer_ext.ops.linear_decode` is faster than a matrix product."""


class Linear(nn.Linear):
    """:class:`torch.nn.Linear`, whose products with a few rows on the CPU run at the speed of memory where no gradient
    is asked for, and those in 16 bits at the speed of float32 where the processor has no instructions for them.
    """

    def forward(self, input: Tensor) -> Tensor:
        served = SERVES_CPU and input.device.type == "cpu" and has_plain_weight(self)
        cast_to = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        # The size last: an exported graph with gradients shall not depend on it.
        few = served and cast_to is None and not torch.is_grad_enabled()
        if few and input.numel() <= MOST_ROWS * self.in_features:
            return ops.linear_decode(input, self.weight, self.bias)
        if served and (cast_to or input.dtype) in SLOW_IN_TORCH and self._takes(input):
            return _as_experts_product(input, self.weight, self.bias)
        return super().forward(input)

    def _takes(self, input: Tensor) -> bool:
        """Whether the product of experts, which knows no distributed weights, is F.linear's."""
        fits = input.dim() > 0 and input.shape[-1] == self.in_features > 0
        return fits and not is_traceable_wrapper_subclass(self.weight)


def _as_experts_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by the product of experts, of which there is one."""
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    layout = ops.expert_layout(torch.zeros(rows.shape[0], 1, dtype=torch.int32), 1)
    y = ops.grouped_gemm(rows, weight[None].transpose(1, 2), layout, bias=None if bias is None else bias[None])
    return y.view(*x.shape[:-1], weight.shape[0])


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
