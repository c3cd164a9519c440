"""Stick-breaking attention of a few new queries over a key/value cache."""

from __future__ import annotations

import torch
from torch import Tensor


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
    r"""Attends from the newest tokens of each sequence to everything its cache holds.

    Query ``i`` of a sequence with ``n`` keys in its cache stands at position ``p = n - T_new + i``, and

    .. math:: o_i = \sum_{j \le p} A_{ij} v_j, \quad A_{ij} = \beta_{ij} \prod_{j < m \le p} (1 - \beta_{im}), \quad
              \beta_{ij} = \mathrm{sigmoid}(\text{scale} \cdot q_i \cdot k_j).

    The cache is read from its newest key backwards, and no further than where every query of a key/value head has at
    most ``stick_epsilon`` of its stick left: from there on the time does not grow with the cache. Results do not
    depend on the number of threads. There is no gradient: :func:`~moduleformer_ext.ops.stick_attention` has one.

    Args:
        q: ``[B, T_new, H_q, D]`` with ``H_q`` a multiple of ``H_kv`` (query head ``h`` reads key/value head
            ``h // (H_q // H_kv)``), or ``[B, T_new, H_kv, G, D]``. float32, float64, bfloat16 or float16; any strides
            with the last dimension contiguous. D is a multiple of 8 up to 1024.
        k_cache: ``[B, S_max, H_kv, D]``, of q's dtype; the keys of the new tokens are already in it.
        v_cache: like ``k_cache``; None: K is V, and the cache is read once for both.
        cache_lengths: ``[B]`` int32, how many keys each sequence has in its cache, the ``T_new`` new ones included.
            What lies beyond is never read. Queries at negative positions see nothing.
        scale: factor of the logits; None: ``D ** -0.5``.
        attend_current: whether a token sees its own key.
        key_padding_mask: ``[B, S_max]`` bool, True for keys that take part.
        stick_epsilon: the walk may stop where a stick is this short, with an error of at most ``stick_epsilon *
            max|v|``; None: 2^-24 (0 for float64). 0: every key is read.
        return_remainder: also return what is left of the sticks.

    Returns:
        The output, in q's shape, dtype and order of strides; with ``return_remainder`` a pair of it and the remainder
        ``[B, T_new, H_q]`` or ``[B, T_new, H_kv, G]`` in float32 (float64 for float64).

    Raises:
        ValueError: for another shape, dtype, device or stride, a length outside ``[0, S_max]``, a ``scale`` that is
            not finite, ``stick_epsilon`` outside ``[0, 1)``, and in grad mode for an input that requires grad.
    """
    out, remainder = torch.ops.moduleformer_ext.stick_attention_decode(
        q, k_cache, v_cache, cache_lengths, scale, attend_current, key_padding_mask, stick_epsilon
    )
    return (out, remainder) if return_remainder else out
