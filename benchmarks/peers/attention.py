"""Stick-breaking attention without a kernel for it, and softmax attention of the same shape.

q is [B, T, K, H, D] (K routed queries per token), k and v are [B, S, H, D] with S >= T; query i stands at position
S - T + i. Results are [B, T, K, H, D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..race import Peer

SDPA = "SDPA (softmax)"


class DenseStickAttention:
    """The reference formulation: what is left of the stick comes from a product with a triangular matrix of ones.

    log A_ij = log β_ij + Σ_m log(1 - β_im) [m > j], the sum as a dense [S, S] product in the activation type.

    Args:
        max_length: the longest S; the triangular matrices are made once, as buffers.
    """

    def __init__(self, max_length: int, dtype: torch.dtype) -> None:
        ones = torch.ones(max_length, max_length, dtype=dtype)  # on the default device
        self.newer = ones.tril(-1)
        self.hidden = ones.triu(1).bool()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new, total = q.shape[1], k.shape[1]
        hidden = self.hidden[total - new : total, :total]
        logits = torch.einsum("btnhd,bshd->bnhts", q, k) * q.shape[-1] ** -0.5
        take = torch.sigmoid(logits).masked_fill(hidden, 0)
        log_leave = F.logsigmoid(-logits).masked_fill(hidden, 0)
        log_left = torch.einsum("bnhtm,mj->bnhtj", log_leave, self.newer[:total, :total])
        return torch.einsum("bnhts,bshd->btnhd", take * log_left.exp(), v)


def cumsum_stick_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The usual shorter way: a reversed cumulative sum of log(1 - β), exclusive of the key itself."""
    new, total = q.shape[1], k.shape[1]
    hidden = torch.ones(new, total, dtype=torch.bool, device=q.device).triu(total - new + 1)
    logits = torch.einsum("btnhd,bshd->bnhts", q, k) * q.shape[-1] ** -0.5
    log_leave = F.logsigmoid(-logits).masked_fill(hidden, 0)
    log_left = log_leave.flip(-1).cumsum(-1).flip(-1) - log_leave
    weights = (F.logsigmoid(logits) + log_left).masked_fill(hidden, -torch.inf).exp()
    return torch.einsum("bnhts,bshd->btnhd", weights, v)


def softmax_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same heads in the layout that PyTorch's softmax attention likes best,
    [B, H K, T, D] and [B, H, S, D], contiguous.
    """
    return q.transpose(2, 3).flatten(2, 3).transpose(1, 2).contiguous(), *(
        t.transpose(1, 2).contiguous() for t in (k, v)
    )


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused softmax attention on :func:`softmax_inputs`: a yardstick, not the same function."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attention_peers(k: int) -> dict[str, Peer]:
    """Other libraries' kernels, where they are installed; they have one query per key (K = 1)."""
    peers: dict[str, Peer] = {}
    if k != 1:
        return peers
    try:
        from stickbreaking_attention.sb_attn import sb_attn
    except ImportError:
        pass
    else:

        def triton(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
            def call() -> Tensor:
                heads_first = (t.transpose(1, 2) for t in (q.squeeze(2), k, v))
                output, _ = sb_attn(*heads_first, attend_current=True)
                return output.transpose(1, 2).unsqueeze(2)

            return call

        peers["stickbreaking-attention (Triton)"] = Peer(triton)
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        pass
    else:

        def flash(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
            return lambda: flash_attn_func(q.squeeze(2), k, v, causal=True).unsqueeze(2)

        peers["flash-attn (softmax)"] = Peer(flash, comparable=False)
    return peers
