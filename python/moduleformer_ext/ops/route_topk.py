"""Routers: gate network, softmax over the experts, top-k and the sums for the losses, in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext.ops._segments import check_dense, segments
from moduleformer_ext.types import RouteTopK, Segments


def centroid_rows(centroids: Segments, temperature: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The rows that directions are multiplied by: exp(temperature) · normalize(centroids), [E_i, G] each, in dtype."""
    scale = temperature.to(dtype).reshape(()).exp()
    # [E, G] is next to nothing beside x: autograd's own operators serve.
    return [
        F.normalize(centre.to(dtype), dim=-1) * scale for centre in segments("route_topk_gmm", "centroids", centroids)
    ]


def route_topk(
    logits: Tensor, k: int, *, order: str = "softmax_topk", noise: Tensor | None = None, num_sampled: int = 0
) -> RouteTopK:
    """Chooses k experts for every token from its logits.

    With p(e | t) the softmax over all E experts, the k experts of the largest logits are chosen, the lower index
    first among equals and NaN before everything (a token with a NaN gets NaN gates, but valid ids). Their gates are

    * ``order="softmax_topk"``: p itself, not renormalised, so that the other logits get gradient too;
    * ``order="topk_softmax"``: the softmax over the k chosen logits.

    With ``num_sampled = s`` only the k - s best are chosen so, and s more are sampled from the remaining ones without
    replacement in proportion to p + 1e-6: those with the largest (p + 1e-6) / noise, in that order.

    Arithmetic is float32 whatever the input type (float64 for float64), under autocast too. Sums over tokens are
    taken in a fixed order: results repeat bit for bit, whatever the number of threads.

    Args:
        logits: ``[T, E]`` float32, float64, bfloat16 or float16. T may be 0.
        k: experts per token, 1 to E.
        order: ``"softmax_topk"`` (ModuleFormer) or ``"topk_softmax"`` (JetMoE, Mixtral).
        noise: ``[T, E]`` independent draws from Exp(1) (``torch.empty(T, E).exponential_()``); with
            ``num_sampled > 0`` only. Not differentiable.
        num_sampled: s, 0 to k.

    Returns:
        :class:`~moduleformer_ext.types.RouteTopK`. ``gates``, ``prob_sum``, ``plogp_sum``, ``logsumexp_sq_sum`` and
        ``logits`` are differentiable, once.

    Raises:
        ValueError: naming the argument, for another shape, dtype or device, k outside 1 to E, ``num_sampled`` outside
            0 to k, noise without ``num_sampled`` or the reverse, and an unknown order.
    """
    return RouteTopK(
        *torch.ops.moduleformer_ext.route_topk(logits, "logits", None, None, [], k, order, noise, num_sampled)
    )


def route_topk_linear(
    x: Tensor,
    weight: Segments,
    k: int,
    *,
    order: str = "softmax_topk",
    noise: Tensor | None = None,
    num_sampled: int = 0,
) -> RouteTopK:
    """Routes x by logits = x Wᵀ.

    Products of 16-bit x and weight are exact and summed in float32. Inputs of different types may meet (float64 only
    float64); in the backward pass of bfloat16 x and weight the gradient of the logits is rounded to bfloat16 before it
    multiplies them.

    Args:
        x: ``[T, D]`` float32, float64, bfloat16 or float16.
        weight: W ``[E, D]``, or a sequence of segments ``[E_i, D]`` of one dtype; only those that require it get a
            gradient, and nothing is concatenated.
        k, order, noise, num_sampled: as in :func:`route_topk`.

    Returns, raises: as :func:`route_topk`.
    """
    return RouteTopK(
        *torch.ops.moduleformer_ext.route_topk(
            x, "linear", None, None, segments("route_topk_linear", "weight", weight), k, order, noise, num_sampled
        )
    )


def route_topk_mlp(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    weight: Segments,
    k: int,
    *,
    order: str = "softmax_topk",
    noise: Tensor | None = None,
    num_sampled: int = 0,
) -> RouteTopK:
    """Routes x by logits = gelu(x Vᵀ + b) Wᵀ with the exact (erf) GELU.

    The hidden layer stays float32 (float64 for float64) between the two products; x Vᵀ + b is kept for the backward
    pass, T · G numbers. Types may be mixed as in :func:`route_topk_linear`.

    Args:
        x: ``[T, D]`` float32, float64, bfloat16 or float16.
        hidden_weight: V ``[G, D]``.
        hidden_bias: b ``[G]``.
        weight: W ``[E, G]`` or a sequence of segments ``[E_i, G]`` of one dtype.
        k, order, noise, num_sampled: as in :func:`route_topk`.

    Returns, raises: as :func:`route_topk`.
    """
    return RouteTopK(
        *torch.ops.moduleformer_ext.route_topk(
            x,
            "mlp",
            hidden_weight,
            hidden_bias,
            segments("route_topk_mlp", "weight", weight),
            k,
            order,
            noise,
            num_sampled,
        )
    )


def route_topk_gmm(
    x: Tensor,
    hidden_weight: Tensor,
    centroids: Segments,
    temperature: Tensor,
    k: int,
    *,
    order: str = "softmax_topk",
    noise: Tensor | None = None,
    num_sampled: int = 0,
) -> RouteTopK:
    """Routes x by cosine similarity: logits = exp(temperature) · normalize(x Vᵀ) · normalize(centroids)ᵀ.

    Numerics as in :func:`route_topk_mlp`; norms are at least 1e-12.

    Args:
        x: ``[T, D]`` float32, float64, bfloat16 or float16.
        hidden_weight: V ``[G, D]``.
        centroids: ``[E, G]`` or a sequence of segments ``[E_i, G]``.
        temperature: one number, a tensor of shape ``[]`` or ``[1]``.
        k, order, noise, num_sampled: as in :func:`route_topk`.

    Returns, raises: as :func:`route_topk`.
    """
    check_dense("route_topk_gmm", "temperature", temperature)
    if temperature.numel() != 1 or not temperature.is_floating_point():
        raise ValueError(
            "route_topk_gmm: temperature must be a floating-point tensor with one element, got "
            f"{temperature.dtype} of shape {tuple(temperature.shape)}"
        )
    parts = segments("route_topk_gmm", "centroids", centroids)
    for centre in parts:
        check_dense("route_topk_gmm", "centroids", centre)
        if centre.dim() != 2 or not centre.is_floating_point():
            raise ValueError(
                f"route_topk_gmm: centroids must be floating-point and have 2 dimensions, got {centre.dtype} of shape "
                f"{tuple(centre.shape)}"
            )
        if hidden_weight.dim() == 2 and centre.shape[1] != hidden_weight.shape[0]:
            raise ValueError(
                f"route_topk_gmm: centroids must have G = {hidden_weight.shape[0]} columns, got shape "
                f"{tuple(centre.shape)}"
            )
    weight = centroid_rows(parts, temperature, torch.float64 if x.dtype == torch.float64 else torch.float32)
    return RouteTopK(
        *torch.ops.moduleformer_ext.route_topk(x, "gmm", hidden_weight, None, weight, k, order, noise, num_sampled)
    )
