"""An attention layer's step for a few new tokens as one op."""

from __future__ import annotations

from torch import Tensor

from moduleformer_ext.ops._layer_decode import expert_weight, layer_decode
from moduleformer_ext.quantised import QuantisedMatrices
from moduleformer_ext.types import NormedRouter, RouteTopK, Segments

_OP = "attention_layer_decode"


def attention_layer_decode(
    x: Tensor,
    router: NormedRouter,
    query_weight: Segments | QuantisedMatrices,
    output_weight: Segments | QuantisedMatrices,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    cache_lengths: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    stick_epsilon: float | None = None,
    return_route: bool = False,
) -> Tensor | tuple[Tensor, RouteTopK]:
    """y = x + attention(norm(x)) of a few new tokens: what a :class:`~moduleformer_ext.nn.Block` does first.

    The tokens are normed (``layer_norm``) and routed (:func:`~moduleformer_ext.ops.route_topk_mlp` and its like). Their
    keys and values are written behind those of the cache, whose lengths grow by T. Every token has k queries, one for
    each chosen expert, each of as many heads as the cache has; they attend to the cache
    (:func:`~moduleformer_ext.ops.stick_attention_decode`), and the output matrices of the same experts lead back to the
    token, times their gates (:func:`~moduleformer_ext.ops.grouped_gemm`, or
    :func:`~moduleformer_ext.ops.quantised_gemm`). The results are bit for bit those of the ops
    one by one; on a CPU keys and values are those of :func:`~moduleformer_ext.ops.linear_decode`.

    The op is for generation: one call instead of a dozen saves the time between them. There is no gradient.

    Args:
        x: ``[B, T, D]`` float32, float64, bfloat16 or float16.
        router: the norm and the router in one :class:`~moduleformer_ext.types.NormedRouter`.
        query_weight: ``[E, D, H * D_h]`` of x's dtype, or segments; or quantised, on the CPU beside x of another dtype
            than float64, on CUDA beside bfloat16 or float16.
        output_weight: ``[E, H * D_h, D]``, likewise.
        k_weight, v_weight: ``[H * D_h, D]`` of x's dtype, contiguous; both None: keys and values are the normed tokens.
        k_bias, v_bias: ``[H * D_h]`` of x's dtype, or None.
        k_cache: ``[B, S_max, H, D_h]`` of x's dtype, contiguous in its last dimension; D_h is a multiple of 8 up to
            1024. Changed in place.
        v_cache: like ``k_cache``; None where ``v_weight`` is None. Changed in place.
        cache_lengths: ``[B]`` int32, contiguous: how many keys each sequence has before the new ones. Grows by T.
        key_padding_mask: ``[B, S_max]`` bool, True for keys that take part.
        stick_epsilon: as in :func:`~moduleformer_ext.ops.stick_attention_decode`.
        return_route: also return how the tokens were routed.

    Returns:
        y ``[B, T, D]`` in x's dtype; with ``return_route`` a pair of it and
        :class:`~moduleformer_ext.types.RouteTopK`.

    Raises:
        ValueError: naming the argument, for another shape, dtype, device or stride, and in grad mode for an input that
            requires grad. On a CPU, with nothing written, for tokens that do not fit into the cache; elsewhere lengths
            are not read, and such tokens overwrite the last place.
    """
    return layer_decode(
        _OP,
        x,
        router,
        *expert_weight(_OP, "query_weight", query_weight),
        *expert_weight(_OP, "output_weight", output_weight),
        k_weight,
        k_bias,
        v_weight,
        v_bias,
        k_cache,
        v_cache,
        cache_lengths,
        key_padding_mask,
        stick_epsilon,
        return_route=return_route,
    )
