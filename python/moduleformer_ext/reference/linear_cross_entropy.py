from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext.reference._common import accumulation_dtype, without_autocast


@without_autocast
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """logsumexp(logits) - logits[target] + z_loss · logsumexp(logits)², with logits = x W^T."""
    logits = F.linear(x, weight).to(accumulation_dtype(x.dtype))
    logsumexp = logits.logsumexp(-1)
    counted = target != ignore_index
    chosen = logits.gather(-1, target.masked_fill(~counted, 0)[..., None])[..., 0]
    losses = (logsumexp - chosen + z_loss * logsumexp.square()).masked_fill(~counted, 0)
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()
