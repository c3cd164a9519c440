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
    logits: Tensor,
    k: int,
    *,
    order: str = "softmax_topk",
    scale: float = 1.0,
    noise: Tensor | None = None,
    num_sampled: int = 0,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scored_per_group: int = 2,
) -> RouteTopK:
    """Chooses k experts for every token from its logits.

    With p(e | t) the softmax over all E experts and s(e | t) the sigmoid of each logit, gates are

    * ``order="softmax_topk"``: p itself, not renormalised, so that the other logits get gradient too;
    * ``order="topk_softmax"``: the softmax over the k chosen logits;
    * ``order="sigmoid_topk"``: s itself;
    * ``order="sigmoid_topk_renormalised"``: s / (the sum of s over the k chosen experts + 1e-20);

    times ``scale``. The k experts of the largest logits are chosen, the lower index first among equals and NaN before
    everything (a token with a NaN gets NaN gates, with ``"sigmoid_topk"`` that expert's alone, but valid ids).

    With a ``selection_bias`` b, experts are ranked by p + b or s + b instead, without effect on the gates. With
    ``top_groups < num_groups``, the E experts are ``num_groups`` consecutive groups of the same size, of which only
    the ``top_groups`` best are left to choose from: a group is as good as the sum of the ``scored_per_group`` largest
    of what its experts are ranked by, which is p + b or s + b, b being 0 where it is not given.

    With ``num_sampled = n`` only the k - n best are chosen so, and n more are sampled from the remaining ones without
    replacement in proportion to p + 1e-6: those with the largest (p + 1e-6) / noise, in that order.

    The sums over tokens are those of the softmax p and of the logits, whatever the order.

    Arithmetic is float32 whatever the input type (float64 for float64), under autocast too. Sums over tokens are
    taken in a fixed order: results repeat bit for bit, whatever the number of threads.

    Args:
        logits: ``[T, E]`` float32, float64, bfloat16 or float16. T may be 0.
        k: experts per token, 1 to E.
        order: ``"softmax_topk"`` (ModuleFormer), ``"topk_softmax"`` (JetMoE, Mixtral), ``"sigmoid_topk"`` or
            ``"sigmoid_topk_renormalised"`` (DeepSeek V3).
        scale: what gates are multiplied by.
        noise: ``[T, E]`` independent draws from Exp(1) (``torch.empty(T, E).exponential_()``); with
            ``num_sampled > 0`` only. Not differentiable.
        num_sampled: n, 0 to k; 0 with sigmoids, ``selection_bias`` or groups left out.
        selection_bias: ``[E]``, of any floating-point type. Not differentiable; -infinity is for experts that shall
            come last.
        num_groups: how many groups the experts make up; divides E.
        top_groups: how many of them a token's experts may come from, 1 to ``num_groups``. They hold at least k experts.
        scored_per_group: 1 (DeepSeek V2) or 2 (V3); without effect unless groups are left out.

    Returns:
        :class:`~moduleformer_ext.types.RouteTopK`. ``gates``, ``prob_sum``, ``plogp_sum``, ``logsumexp_sq_sum`` and
        ``logits`` are differentiable, once.

    Raises:
        ValueError: naming the argument, for another shape, dtype or device, k outside 1 to E, a scale that is not
            finite in float32, ``num_sampled`` outside 0 to k or where there is no sampling, noise without
            ``num_sampled`` or the reverse, groups that the experts do not divide into, that are too many or too few,
            and an unknown order.
    """
    choice = (scale, noise, num_sampled, selection_bias, num_groups, top_groups, scored_per_group)
    return RouteTopK(*torch.ops.moduleformer_ext.route_topk(logits, "logits", None, None, [], k, order, *choice))


def route_topk_linear(
    x: Tensor,
    weight: Segments,
    k: int,
    *,
    order: str = "softmax_topk",
    scale: float = 1.0,
    noise: Tensor | None = None,
    num_sampled: int = 0,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scored_per_group: int = 2,
) -> RouteTopK:
    """Routes x by logits = x Wᵀ.

    Products of 16-bit x and weight are exact and summed in float32. Inputs of different types may meet (float64 only
    float64); in the backward pass of bfloat16 x and weight the gradient of the logits is rounded to bfloat16 before it
    multiplies them.

    Args:
        x: ``[T, D]`` float32, float64, bfloat16 or float16.
        weight: W ``[E, D]``, or a sequence of segments ``[E_i, D]`` of one dtype; only those that require it get a
            gradient, and nothing is concatenated.
        k and all others: as in :func:`route_topk`.

    Returns, raises: as :func:`route_topk`.
    """
    choice = (scale, noise, num_sampled, selection_bias, num_groups, top_groups, scored_per_group)
    rows = segments("route_topk_linear", "weight", weight)
    return RouteTopK(*torch.ops.moduleformer_ext.route_topk(x, "linear", None, None, rows, k, order, *choice))


def route_topk_mlp(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    weight: Segments,
    k: int,
    *,
    order: str = "softmax_topk",
    scale: float = 1.0,
    noise: Tensor | None = None,
    num_sampled: int = 0,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scored_per_group: int = 2,
) -> RouteTopK:
    """Routes x by logits = gelu(x Vᵀ + b) Wᵀ with the exact (erf) GELU.

    The hidden layer stays float32 (float64 for float64) between the two products; x Vᵀ + b is kept for the backward
    pass, T · G numbers. Types may be mixed as in :func:`route_topk_linear`.

    Args:
        x: ``[T, D]`` float32, float64, bfloat16 or float16.
        hidden_weight: V ``[G, D]``.
        hidden_bias: b ``[G]``.
        weight: W ``[E, G]`` or a sequence of segments ``[E_i, G]`` of one dtype.
        k and all others: as in :func:`route_topk`.

    Returns, raises: as :func:`route_topk`.
    """
    choice = (scale, noise, num_sampled, selection_bias, num_groups, top_groups, scored_per_group)
    rows = segments("route_topk_mlp", "weight", weight)
    return RouteTopK(
        *torch.ops.moduleformer_ext.route_topk(x, "mlp", hidden_weight, hidden_bias, rows, k, order, *choice)
    )


def route_topk_gmm(
    x: Tensor,
    hidden_weight: Tensor,
    centroids: Segments,
    temperature: Tensor,
    k: int,
    *,
    order: str = "softmax_topk",
    scale: float = 1.0,
    noise: Tensor | None = None,
    num_sampled: int = 0,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scored_per_group: int = 2,
) -> RouteTopK:
    """Routes x by cosine similarity: logits = exp(temperature) · normalize(x Vᵀ) · normalize(centroids)ᵀ.

    Numerics as in :func:`route_topk_mlp`; norms are at least 1e-12.

    Args:
        x: ``[T, D]`` float32, float64, bfloat16 or float16.
        hidden_weight: V ``[G, D]``.
        centroids: ``[E, G]`` or a sequence of segments ``[E_i, G]``.
        temperature: one number, a tensor of shape ``[]`` or ``[1]``.
        k and all others: as in :func:`route_topk`.

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
    choice = (scale, noise, num_sampled, selection_bias, num_groups, top_groups, scored_per_group)
    return RouteTopK(*torch.ops.moduleformer_ext.route_topk(x, "gmm", hidden_weight, None, weight, k, order, *choice))
