"""Stick-breaking attention, evaluated whole and in the log domain: quadratic memory, exact in saturation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext.reference._common import accumulation_dtype, without_autocast


def _check_stick_epsilon(op: str, stick_epsilon: float | None) -> None:
    if stick_epsilon is not None and not 0 <= stick_epsilon < 1:
        raise ValueError(f"{op}: stick_epsilon must lie in [0, 1), got {stick_epsilon}")


def _stick_breaking(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Weights A [..., T_q, T_k] and remainders [..., T_q] of scores, where ``valid`` says which keys may
    take stick.

    A_ij = sigmoid(s_ij) · Π_{m > j} (1 - sigmoid(s_im)), keys being ordered oldest first.
    """
    log_take = F.logsigmoid(scores).masked_fill(~valid, -torch.inf)
    log_leave = F.logsigmoid(-scores).masked_fill(~valid, 0)
    # What is left once key j and all newer keys took their part. Shifted, not subtracted: nothing cancels.
    log_left_after = log_leave.flip(-1).cumsum(-1).flip(-1)
    log_left_before = F.pad(log_left_after[..., 1:], (0, 1))
    return (log_take + log_left_before).exp(), log_leave.sum(-1).exp()


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, valid: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, T_q, H, G, D], k and v [B, T_k, H, D], valid broadcastable to [B, H, G, T_q, T_k]."""
    dtype = accumulation_dtype(q.dtype)
    scores = torch.einsum("bihgd,bjhd->bhgij", q.to(dtype), k.to(dtype)) * scale
    weights, remainder = _stick_breaking(scores, valid)
    out = torch.einsum("bhgij,bjhd->bihgd", weights, v.to(dtype))
    return out.to(q.dtype), remainder.permute(0, 3, 1, 2)


def _grouped(q: Tensor, num_kv_heads: int) -> Tensor:
    """[..., H_q, D] -> [..., H_kv, G, D]."""
    if q.shape[-2] % num_kv_heads:
        raise ValueError(f"stick_attention: q must have a multiple of k's {num_kv_heads} heads, got {q.shape[-2]}")
    return torch.unflatten(q, -2, (num_kv_heads, -1))


@without_autocast
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
    """o_i = Σ_j A_ij v_j with A_ij = β_ij Π_{j<m≤i} (1 - β_im), β_ij = sigmoid(scale · q_i·k_j).

    q is [B, T_q, H_q, D] or [B, T_q, H_kv, G, D], k and v [B, T_k, H_kv, D]; ``v=None`` means v is k. Query
    i stands at position T_k - T_q + i and sees keys up to itself (``attend_current``) or before itself. With
    ``cu_seqlens`` (int32, [sequences + 1]) sequences are packed along the first dimension and there is no B.
    ``key_padding_mask`` [B, T_k] bool is True for keys that take part. The remainder is [B, T_q, H_q] or [B,
    T_q, H_kv, G]. Every key is visited, whatever ``stick_epsilon`` (it allows an implementation to stop
    early, and bounds the error of doing so).
    """
    _check_stick_epsilon("stick_attention", stick_epsilon)
    v = k if v is None else v
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    if cu_seqlens_q is not None:
        if key_padding_mask is not None:
            raise ValueError("stick_attention: key_padding_mask and cu_seqlens exclude one another")
        bounds_q = cu_seqlens_q.tolist()
        bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
        parts = []
        for i in range(len(bounds_q) - 1):
            of_q, of_k = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
            o, r = stick_attention(
                q[None, of_q],
                k[None, of_k],
                v[None, of_k],
                scale=scale,
                attend_current=attend_current,
                return_remainder=True,
            )
            parts.append((o[0], r[0]))
        out = torch.cat([o for o, _ in parts]) if parts else torch.zeros_like(q)
        if not return_remainder:
            return out
        empty = q.new_ones(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
        return out, torch.cat([r for _, r in parts]) if parts else empty

    t_q, t_k = q.shape[1], k.shape[1]
    if t_q > t_k:
        raise ValueError(f"stick_attention: q must not have more positions than k ({t_k}), got {t_q}")
    newest = torch.arange(t_k - t_q, t_k, device=q.device) - int(not attend_current)
    valid = torch.arange(t_k, device=q.device) <= newest[:, None]
    if key_padding_mask is not None:
        valid = valid & key_padding_mask[:, None, None, None, :]

    grouped = q if q.dim() == 5 else _grouped(q, k.shape[-2])
    out, remainder = _attend(grouped, k, v, scale, valid)
    if q.dim() == 4:
        out, remainder = out.flatten(2, 3), remainder.flatten(2, 3)
    return (out, remainder) if return_remainder else out


@without_autocast
def stick_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    cache_lengths: Tensor,
    *,
    scale: float | None = None,
    attend_current: bool = True,
    key_padding_mask: Tensor | None = None,
    stick_epsilon: float | None = None,
    return_remainder: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A few new queries against a cache that was allocated for S_max keys.

    q [B, T_new, H_q, D] or [B, T_new, H_kv, G, D]; k_cache and v_cache [B, S_max, H_kv, D], ``v_cache=None``
    means K is V; cache_lengths [B] int32, the valid keys of each sequence including the T_new new ones;
    key_padding_mask [B, S_max].
    """
    _check_stick_epsilon("stick_attention_decode", stick_epsilon)
    v_cache = k_cache if v_cache is None else v_cache
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    t_new = q.shape[1]
    last = cache_lengths.long()[:, None] - t_new + torch.arange(t_new, device=q.device) - int(not attend_current)
    slots = torch.arange(k_cache.shape[1], device=q.device)
    valid = slots <= last[:, :, None]
    if key_padding_mask is not None:
        valid = valid & key_padding_mask[:, None, :]

    # What lies beyond the valid keys was never written; 0 · NaN would leak it.
    written = (slots < cache_lengths[:, None])[:, :, None, None]
    keys, values = k_cache.where(written, 0), v_cache.where(written, 0)

    grouped = q if q.dim() == 5 else _grouped(q, k_cache.shape[-2])
    out, remainder = _attend(grouped, keys, values, scale, valid[:, None, None])
    if q.dim() == 4:
        out, remainder = out.flatten(2, 3), remainder.flatten(2, 3)
    return (out, remainder) if return_remainder else out
