"""Mixture of attention heads: routed query and output projections around shared keys and values."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduleformer_ext import ops
from moduleformer_ext.nn.cache import LayerCache
from moduleformer_ext.nn.experts import ExpertLinear
from moduleformer_ext.nn.linear import Linear
from moduleformer_ext.nn.router import Router
from moduleformer_ext.types import ExpertLayout, RouteTopK

MAX_DECODE_QUERIES = 16
"""Up to so many new tokens the decoding kernel is used, which splits the work over the cache instead of the queries."""

_HEAD_MULTIPLE = 8
"""The kernels take heads of a multiple of so many elements."""


class RoutedProjection(nn.Module):
    """The query and output experts of an attention layer, which share one routing decision."""

    def __init__(self, n_embd: int, att_hidden: int, router: Router) -> None:
        super().__init__()
        self.experts = ExpertLinear(router.num_experts, n_embd, att_hidden)
        self.output_experts = ExpertLinear(router.num_experts, att_hidden, n_embd)
        self.gate = router

    def map(self, tokens: Tensor) -> tuple[Tensor, RouteTopK, ExpertLayout]:
        """tokens [T, D] -> queries [T, K, A], one per chosen expert, not gated."""
        route = self.gate(tokens)
        layout = ops.expert_layout(route.expert_ids, self.gate.num_experts)
        q = ops.grouped_gemm(tokens, self.experts.segments, layout, x_order="token", out_order="slot")
        return q, route, layout

    def reduce(self, heads: Tensor, route: RouteTopK, layout: ExpertLayout) -> Tensor:
        """heads [T, K, A] -> [T, D]: the gated sum over the experts that made the queries."""
        return ops.grouped_gemm(
            heads,
            self.output_experts.segments,
            layout,
            x_order="slot",
            out_order="token",
            gates=route.gates,
        )


class MixtureOfAttention(nn.Module):
    """Stick-breaking attention whose queries come from routed experts; no positions are encoded.

    Keys and values are shared by all experts: biased linear maps of the token, or the token itself where
    ``att_hidden == n_embd`` and ``n_head == 1``. Each of a token's K queries has ``n_head`` heads.

    Args:
        n_embd: D.
        att_hidden: A, the width of all heads together; a multiple of ``n_head``.
        n_head: heads of keys and values.
        router: decides which query experts see a token.
        stick_epsilon: stop walking keys once so little of every stick is left; None for the type's default.
    """

    def __init__(
        self,
        n_embd: int,
        att_hidden: int,
        n_head: int,
        router: Router,
        *,
        stick_epsilon: float | None = None,
    ) -> None:
        super().__init__()
        if att_hidden % n_head:
            raise ValueError(
                f"MixtureOfAttention: att_hidden must be a multiple of n_head ({n_head}), got {att_hidden}"
            )
        self.q_proj = RoutedProjection(n_embd, att_hidden, router)
        self.identity_kv = att_hidden == n_embd and n_head == 1
        self.k_proj = nn.Identity() if self.identity_kv else Linear(n_embd, att_hidden)
        self.v_proj = nn.Identity() if self.identity_kv else Linear(n_embd, att_hidden)
        self.n_head = n_head
        self.head_dim = att_hidden // n_head
        self.stick_epsilon = stick_epsilon

    def forward(
        self,
        x: Tensor,
        past: LayerCache | None = None,
        key_padding_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, RouteTopK, LayerCache | None]:
        """Attend from the new tokens x [B, T, D] to the past and to themselves.

        Args:
            past: keys and values of earlier tokens; gradients do not reach them.
            key_padding_mask: [B, past + T] bool, True for tokens that can be attended to.
            use_cache: also return the cache that holds past and new tokens.
        """
        batch, length, _ = x.shape
        heads = (self.n_head, self.head_dim)
        q, route, layout = self.q_proj.map(x.flatten(0, 1))
        # [B, T, K, H, D] -> [B, T, H, K, D]: the K queries of a token are K query heads over each key head.
        q = torch.unflatten(q.view(batch, length, *q.shape[1:]), -1, heads).transpose(2, 3)
        k = torch.unflatten(self.k_proj(x), -1, heads)
        v = None if self.identity_kv else torch.unflatten(self.v_proj(x), -1, heads)

        decoding = False
        if past is None:
            present = LayerCache.of(k, v) if use_cache else None
        else:
            decoding = not torch.is_grad_enabled() and past.length > 0 and length <= MAX_DECODE_QUERIES
            k, v, present = past.extend(k, v)

        scale = self.head_dim**-0.5
        if self.head_dim % _HEAD_MULTIPLE:  # zeros change no product, and are cut off again
            q, k = _pad_heads(q), _pad_heads(k)
            v = None if v is None else _pad_heads(v)
        if decoding:
            lengths = torch.full((batch,), k.shape[1], dtype=torch.int32, device=x.device)
            attended = ops.stick_attention_decode(
                q,
                k,
                v,
                lengths,
                scale=scale,
                key_padding_mask=key_padding_mask,
                stick_epsilon=self.stick_epsilon,
            )
        else:
            attended = ops.stick_attention(
                q,
                k,
                v,
                scale=scale,
                key_padding_mask=key_padding_mask,
                stick_epsilon=self.stick_epsilon,
            )
        attended = cast(Tensor, attended)[..., : self.head_dim]  # a pair only where remainders are asked for
        attended = attended.transpose(2, 3).flatten(0, 1).flatten(2)
        y = self.q_proj.reduce(attended, route, layout)
        return y.view_as(x), route, present if use_cache else None


def _pad_heads(heads: Tensor) -> Tensor:
    return F.pad(heads, (0, -heads.shape[-1] % _HEAD_MULTIPLE))
