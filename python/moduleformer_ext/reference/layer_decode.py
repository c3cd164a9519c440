"""Both layers of a block for a few new tokens: x + layer(norm(x)); and a stack of such blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext.quantised import QuantisedMatrices
from moduleformer_ext.reference._common import accumulation_dtype, joined, without_autocast
from moduleformer_ext.reference.expert_layout import expert_layout
from moduleformer_ext.reference.grouped_gemm import expert_ffn, grouped_gemm
from moduleformer_ext.reference.linear_decode import linear_decode
from moduleformer_ext.reference.quantised_gemm import quantised_gemm
from moduleformer_ext.reference.route_topk import route_topk, route_topk_linear, route_topk_mlp
from moduleformer_ext.reference.stick_attention import stick_attention_decode
from moduleformer_ext.types import BlockWeights, ExpertLayout, NormedRouter, RouteTopK, Segments


def _norm(x: Tensor, router: NormedRouter) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    weight, bias = router.norm_weight.to(dtype), router.norm_bias.to(dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, router.norm_epsilon).to(x.dtype)


def _route(op: str, tokens: Tensor, router: NormedRouter) -> RouteTopK:
    """Which experts the normed tokens [T, D] go to."""
    gate, hidden_weight, hidden_bias, gate_weight, k, order = router[:6]
    if gate == "linear":
        return route_topk_linear(tokens, gate_weight, k, order=order)
    if gate == "mlp" and hidden_weight is not None and hidden_bias is not None:
        return route_topk_mlp(tokens, hidden_weight, hidden_bias, gate_weight, k, order=order)
    if gate == "gmm" and hidden_weight is not None:
        dtype = accumulation_dtype(tokens.dtype)
        direction = F.normalize(F.linear(tokens.to(dtype), hidden_weight.to(dtype)), dim=-1)
        return route_topk(F.linear(direction, joined(gate_weight).to(dtype)), k, order=order)
    raise ValueError(f"{op}: gate must be 'linear', 'mlp' or 'gmm' with its hidden layer, got {gate!r}")


def _product(x: Tensor, weight: Segments | QuantisedMatrices, layout: ExpertLayout, **options: Any) -> Tensor:
    if isinstance(weight, QuantisedMatrices):
        return quantised_gemm(x, weight, layout, **options)
    return grouped_gemm(x, weight, layout, **options)


@without_autocast
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
    """y = x + attention(norm(x)) for x [B, T, D], after keys and values were appended to the caches.

    k_cache and v_cache [B, S_max, H, D_h], of which cache_lengths [B] are filled, all three changed in place; None for
    v_cache, k_weight and v_weight: keys and values are norm(x). query_weight [E, D, H * D_h] gives every token k
    queries of H heads, output_weight [E, H * D_h, D] leads back. ``stick_epsilon`` changes nothing here.
    """
    batch, length, _ = x.shape
    heads, head_dim = k_cache.shape[2:]
    normed = _norm(x, router)
    tokens = normed.flatten(0, 1)
    route = _route("attention_layer_decode", tokens, router)
    layout = expert_layout(route.expert_ids, route.counts.shape[0])

    positions = cache_lengths.long()[:, None] + torch.arange(length, device=x.device)
    rows = torch.arange(batch, device=x.device)[:, None]
    for cache, weight, bias in ((k_cache, k_weight, k_bias), (v_cache, v_weight, v_bias)):
        if cache is not None:
            new = normed if weight is None else linear_decode(normed, weight, bias)
            cache[rows, positions] = new.unflatten(-1, (heads, head_dim))
    cache_lengths += length

    q = _product(tokens, query_weight, layout, out_order="slot")
    q = q.view(batch, length, router.k, heads, head_dim).transpose(2, 3)
    attended = stick_attention_decode(q, k_cache, v_cache, cache_lengths, key_padding_mask=key_padding_mask)
    attended = cast(Tensor, attended).transpose(2, 3).reshape(batch * length, router.k, heads * head_dim)
    back = _product(attended, output_weight, layout, x_order="slot", out_order="token", gates=route.gates)
    y = x + back.view_as(x)
    return (y, route) if return_route else y


@without_autocast
def ffn_layer_decode(
    x: Tensor,
    router: NormedRouter,
    up: Segments | QuantisedMatrices,
    down: Segments | QuantisedMatrices,
    *,
    activation: str = "gelu_tanh",
    return_route: bool = False,
) -> Tensor | tuple[Tensor, RouteTopK]:
    """y = x + ffn(norm(x)) for x [B, T, D], with the experts up [E, D, F] and down [E, F, D]."""
    tokens = _norm(x, router).flatten(0, 1)
    route = _route("ffn_layer_decode", tokens, router)
    layout = expert_layout(route.expert_ids, route.counts.shape[0])
    if isinstance(up, QuantisedMatrices) or isinstance(down, QuantisedMatrices):
        hidden = _product(tokens, up, layout, activation=activation)
        transformed = _product(hidden, down, layout, x_order="expert", out_order="token", gates=route.gates)
    else:
        transformed = expert_ffn(tokens, up, down, layout, route.gates, activation=activation)
    y = x + transformed.view_as(x)
    return (y, route) if return_route else y


@without_autocast
def blocks_decode(
    x: Tensor,
    blocks: Sequence[BlockWeights],
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor] | None,
    cache_lengths: Sequence[Tensor],
    *,
    key_padding_mask: Tensor | None = None,
    stick_epsilon: float | None = None,
) -> Tensor:
    """Both layers of every block, one block after the other, each with the caches of its index."""
    options: dict[str, Any] = {"key_padding_mask": key_padding_mask, "stick_epsilon": stick_epsilon}
    for i, block in enumerate(blocks):
        attention_router, *attention, ffn_router, up, down, activation = cast(Any, block)
        caches: Any = (k_caches[i], None if v_caches is None else v_caches[i], cache_lengths[i])
        x = cast(Tensor, attention_layer_decode(x, attention_router, *attention, *caches, **options))
        x = cast(Tensor, ffn_layer_decode(x, ffn_router, up, down, activation=activation))
    return x
