"""Mixture of attention heads: routed query and output projections around shared keys and values."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduleformer_ext import ops
from moduleformer_ext.nn.cache import LayerCache, StaticLayerCache
from moduleformer_ext.nn.dispatch import Dispatch, Exchange, arrange
from moduleformer_ext.nn.experts import make_experts
from moduleformer_ext.nn.linear import Linear
from moduleformer_ext.nn.plain import is_plain
from moduleformer_ext.nn.router import Router
from moduleformer_ext.types import ExpertLayout, RouteTopK

MAX_DECODE_QUERIES = 16
"""Up to so many new tokens the decoding kernel is used, which splits the work over the cache instead of the queries."""

HEAD_MULTIPLE = 8
"""The kernels take heads of a multiple of so many elements."""


class RoutedProjection(nn.Module):
    """The query and output experts of an attention layer, which share one routing decision."""

    def __init__(self, n_embd: int, att_hidden: int, router: Router, expert_bits: int | None = None) -> None:
        super().__init__()
        self.experts = make_experts(router.num_experts, n_embd, att_hidden, expert_bits)
        self.output_experts = make_experts(router.num_experts, att_hidden, n_embd, expert_bits)
        self.gate = router
        self.exchange: Exchange | None = None
        """As in :class:`~moduleformer_ext.nn.MixtureOfFFN`."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, RouteTopK, ExpertLayout | Dispatch]:
        """tokens [T, D] -> queries [T, K, A], one per chosen expert, not gated; and what ``output_experts`` need to
        take the attended heads back to the tokens.
        """
        route = self.gate(tokens)
        layout = arrange(route, self.exchange)
        return self.experts(tokens, layout, out_order="slot"), route, layout


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
        expert_bits: as in :class:`MixtureOfFFN`.
    """

    def __init__(
        self,
        n_embd: int,
        att_hidden: int,
        n_head: int,
        router: Router,
        *,
        stick_epsilon: float | None = None,
        expert_bits: int | None = None,
    ) -> None:
        super().__init__()
        if att_hidden % n_head:
            raise ValueError(
                f"MixtureOfAttention: att_hidden must be a multiple of n_head ({n_head}), got {att_hidden}"
            )
        self.q_proj = RoutedProjection(n_embd, att_hidden, router, expert_bits)
        self.identity_kv = att_hidden == n_embd and n_head == 1
        self.k_proj = nn.Identity() if self.identity_kv else Linear(n_embd, att_hidden)
        self.v_proj = nn.Identity() if self.identity_kv else Linear(n_embd, att_hidden)
        self.n_head = n_head
        self.head_dim = att_hidden // n_head
        self.stick_epsilon = stick_epsilon

    def forward(
        self,
        x: Tensor,
        past: LayerCache | StaticLayerCache | None = None,
        key_padding_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, RouteTopK, LayerCache | StaticLayerCache | None]:
        """Attend from the new tokens x [B, T, D] to the past and to themselves.

        Args:
            past: keys and values of earlier tokens; gradients do not reach them.
            key_padding_mask: [B, past + T] bool, True for tokens that can be attended to; [B, capacity] beside a
                static cache.
            use_cache: also return the cache that holds past and new tokens.
        """
        batch, length, _ = x.shape
        q, route, layout = self.q_proj(x.flatten(0, 1))
        # [B, T, K, H, D] -> [B, T, H, K, D]: the K queries of a token are K query heads over each key head.
        q = q.view(batch, length, q.shape[1], self.n_head, self.head_dim).transpose(2, 3)
        heads = (batch, length, self.n_head, self.head_dim)
        k = self.k_proj(x).view(heads)
        v = None if self._keys_are_values() else self.v_proj(x).view(heads)

        lengths, present = None, past
        if isinstance(past, StaticLayerCache):
            past.append(k, v)
            k, v, lengths = past.keys, past.values, past.lengths
        elif past is not None:
            decoding = not torch.is_grad_enabled() and past.length > 0 and length <= MAX_DECODE_QUERIES
            k, v, present = past.extend(k, v)
            if decoding:
                lengths = k.new_full((batch,), k.shape[1], dtype=torch.int32)
        elif use_cache:
            present = LayerCache.of(k, v)

        attended = self._attend(q, k, v, lengths, key_padding_mask).transpose(2, 3)
        attended = attended.reshape(batch * length, q.shape[3], self.n_head * self.head_dim)
        y = self.q_proj.output_experts(attended, layout, x_order="slot", out_order="token", gates=route.gates)
        return y.view_as(x), route, present if use_cache else None

    def _keys_are_values(self) -> bool:
        return self.identity_kv and is_plain(self.k_proj, nn.Identity) and is_plain(self.v_proj, nn.Identity)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor | None, lengths: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor:
        """q [B, T, H, K, D] to k and v [B, S, H, D], filled as far as ``lengths`` [B] say, if given."""
        scale = self.head_dim**-0.5
        padded = self.head_dim % HEAD_MULTIPLE != 0
        if padded:  # zeros change no product, and are cut off again
            q, k = _pad_heads(q), _pad_heads(k)
            v = None if v is None else _pad_heads(v)
        attended: Tensor | tuple[Tensor, Tensor]
        if lengths is None:
            attended = ops.stick_attention(
                q, k, v, scale=scale, key_padding_mask=key_padding_mask, stick_epsilon=self.stick_epsilon
            )
        else:
            attended = ops.stick_attention_decode(
                q, k, v, lengths, scale=scale, key_padding_mask=key_padding_mask, stick_epsilon=self.stick_epsilon
            )
        attended = cast(Tensor, attended)  # a pair only where remainders are asked for
        return attended[..., : self.head_dim] if padded else attended


def _pad_heads(heads: Tensor) -> Tensor:
    return F.pad(heads, (0, -heads.shape[-1] % HEAD_MULTIPLE))
