"""Causal attention whose weights break a stick instead of normalising a softmax."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor


@overload
def stick_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = ...,
    *,
    scale: float | None = ...,
    attend_current: bool = ...,
    key_padding_mask: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    stick_epsilon: float | None = ...,
    return_remainder: Literal[False] = ...,
) -> Tensor: ...
@overload
def stick_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = ...,
    *,
    scale: float | None = ...,
    attend_current: bool = ...,
    key_padding_mask: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    stick_epsilon: float | None = ...,
    return_remainder: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def stick_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    attend_current: bool = True,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    stick_epsilon: float | None = None,
    return_remainder: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Stick-breaking attention: each query hands out one stick, newest key first.

    .. math::
        o_i = \sum_j A_{ij} v_j, \quad A_{ij} = \beta_{ij} \prod_{j<m\le i} (1 - \beta_{im}), \quad
        \beta_{ij} = \mathrm{sigmoid}(\mathrm{scale} \cdot q_i \cdot k_j)

    Query i stands at position ``T_k - T_q + i`` among the keys and sees the keys up to its own position. Rows sum to
    ``1 - remainder``; there is no positional encoding and no renormalisation. Memory is linear in T. Products
    accumulate, and sticks are kept, in float32 (float64 for float64). Differentiable once in q, k and v, through the
    remainder too; deterministic, the same bits for every number of threads.

    Args:
        q: ``[B, T_q, H_q, D]``, query head h reading K/V head ``h // (H_q // H_kv)``; or ``[B, T_q, H_kv, G, D]``.
            float32, float64, bfloat16 or float16; D a multiple of 8 in 8..1024; any strides (no copy is made where
            the last dimension is contiguous).
        k: ``[B, T_k, H_kv, D]``, ``T_k >= T_q``, of q's dtype.
        v: as k; None means v is k.
        scale: factor of the logits; default ``D ** -0.5``.
        attend_current: whether a query sees the key at its own position, or only those before it.
        key_padding_mask: ``[B, T_k]`` bool, True keeps a key. A key that is not kept takes no stick.
        cu_seqlens_q: ``[N + 1]`` int32: N sequences are packed along the first dimension, sequence n being
            ``q[cu_seqlens_q[n]:cu_seqlens_q[n + 1]]``, and there is no B: q is ``[total, H_q, D]`` or
            ``[total, H_kv, G, D]``, k and v ``[total, H_kv, D]``.
        cu_seqlens_k: the same for k and v; default ``cu_seqlens_q``.
        stick_epsilon: a tile of queries stops walking to older keys when every stick left in it is at most this: an
            absolute error of at most ``stick_epsilon * max|v|``, below rounding at the default 2**-24. 0, the default
            for float64, never stops.
        return_remainder: also return what is left of each stick.

    Returns:
        o in q's shape, dtype and stride order; with ``return_remainder`` also the remainder, float32 (float64 for
        float64), in q's shape without D.

    Raises:
        ValueError: for any other shape, dtype or device, a scale that is not finite, ``stick_epsilon`` outside
            ``[0, 1)``, ``T_q > T_k``, and cu_seqlens that do not ascend from 0 to the total.
    """
    o, remainder, _, _ = torch.ops.moduleformer_ext.stick_attention_forward(
        q, k, v, scale, attend_current, key_padding_mask, cu_seqlens_q, cu_seqlens_k, stick_epsilon, False
    )
    return (o, remainder) if return_remainder else o
