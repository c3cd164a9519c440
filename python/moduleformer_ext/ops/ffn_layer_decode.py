"""A feed-forward layer's step for a few new tokens as one op."""

from __future__ import annotations

from torch import Tensor

from moduleformer_ext.ops._layer_decode import expert_weight, layer_decode
from moduleformer_ext.quantised import QuantisedMatrices
from moduleformer_ext.types import NormedRouter, RouteTopK, Segments

_OP = "ffn_layer_decode"


def ffn_layer_decode(
    x: Tensor,
    router: NormedRouter,
    up: Segments | QuantisedMatrices,
    down: Segments | QuantisedMatrices,
    *,
    activation: str = "gelu_tanh",
    return_route: bool = False,
) -> Tensor | tuple[Tensor, RouteTopK]:
    """y = x + ffn(norm(x)) of a few new tokens: what a :class:`~moduleformer_ext.nn.Block` does last.

    The tokens are normed (``layer_norm``), routed (:func:`~moduleformer_ext.ops.route_topk_mlp` and its like) and go
    through their experts (:func:`~moduleformer_ext.ops.expert_ffn`, or two of
    :func:`~moduleformer_ext.ops.quantised_gemm`). The results are bit for bit those of the ops one
    by one; there is no gradient.

    Args:
        x: ``[B, T, D]`` float32, float64, bfloat16 or float16.
        router: the norm and the router in one :class:`~moduleformer_ext.types.NormedRouter`.
        up: ``[E, D, F]`` (``[E, D, 2F]`` for a gated activation) of x's dtype, or segments; or quantised, on the CPU
            beside x of another dtype than float64, on CUDA beside bfloat16 or float16 (for a gated activation with a
            multiple of 128 columns).
        down: ``[E, F, D]``, likewise.
        activation: as in :func:`~moduleformer_ext.ops.expert_ffn`.
        return_route: also return how the tokens were routed.

    Returns:
        y ``[B, T, D]`` in x's dtype; with ``return_route`` a pair of it and
        :class:`~moduleformer_ext.types.RouteTopK`.

    Raises:
        ValueError: naming the argument, for another shape, dtype or device, and in grad mode for an input that
            requires grad.
    """
    return layer_decode(
        _OP,
        x,
        router,
        *expert_weight(_OP, "up", up),
        *expert_weight(_OP, "down", down),
        activation,
        return_route=return_route,
    )
