"""A whole layer and a whole model in the reference formulation.

Parameters carry the names of published checkpoints, so that a state dict of ours loads with ``assign=True`` and both
compute with the same memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moduleformer_ext.types import ExpertLayout

from ..inputs import LayerShape
from .attention import DenseStickAttention
from .experts import (
    ffn,
    loop_product,
    mlp_logits,
    moa_map,
    moa_reduce,
    mutual_information_loss,
    route,
    sorted_layout,
)

Past = tuple[Tensor, Tensor]
"""Keys and values of earlier tokens, [B, S, H, D] each."""


class _Experts(nn.Module):
    def __init__(self, experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, rows, columns))


class _Gate(nn.Module):
    """Linear, GELU, linear; then softmax, top-k and a sort of the slots."""

    def __init__(self, d: int, gating_size: int, experts: int, k: int) -> None:
        super().__init__()
        self.w_gate = nn.Sequential(
            nn.Linear(d, gating_size), nn.GELU(), nn.Dropout(0.0), nn.Linear(gating_size, experts, bias=False)
        )
        self.experts, self.k = experts, k

    def forward(self, x: Tensor) -> tuple[Tensor, ExpertLayout, Tensor]:
        hidden, last = self.w_gate[0], self.w_gate[3]
        routing = route(mlp_logits(x, hidden.weight, hidden.bias, last.weight), self.k)
        layout = sorted_layout(routing.expert_ids, self.experts)
        return routing.gates, layout, mutual_information_loss(routing, x.shape[0])


class _RoutedProjection(nn.Module):
    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.experts = _Experts(shape.att_experts, shape.d, shape.att_hidden)
        self.output_experts = _Experts(shape.att_experts, shape.att_hidden, shape.d)
        self.gate = _Gate(shape.d, shape.gating_size, shape.att_experts, shape.k)


class _Attention(nn.Module):
    def __init__(self, shape: LayerShape, dense: DenseStickAttention) -> None:
        super().__init__()
        self.q_proj = _RoutedProjection(shape)
        self.identity_kv = shape.heads == 1 and shape.att_hidden == shape.d
        if not self.identity_kv:
            self.k_proj = nn.Linear(shape.d, shape.att_hidden)
            self.v_proj = nn.Linear(shape.d, shape.att_hidden)
        self.heads, self.k = shape.heads, shape.k
        self.dense = dense

    def forward(self, x: Tensor, past: Past | None) -> tuple[Tensor, Tensor, Past]:
        batch, length, _ = x.shape
        tokens = x.flatten(0, 1)
        gates, layout, loss = self.q_proj.gate(tokens)
        q = moa_map(loop_product, tokens, self.q_proj.experts.weight, layout)
        q = q.view(batch, length, self.k, self.heads, -1)
        keys = x if self.identity_kv else self.k_proj(x)
        values = x if self.identity_kv else self.v_proj(x)
        keys, values = (t.unflatten(-1, (self.heads, -1)) for t in (keys, values))
        if past is not None:
            keys, values = torch.cat([past[0], keys], 1), torch.cat([past[1], values], 1)
        heads = self.dense(q, keys, values).reshape(batch * length, self.k, -1)
        y = moa_reduce(loop_product, heads, self.q_proj.output_experts.weight, layout, gates)
        return y.view_as(x), loss, (keys, values)


class _FFN(nn.Module):
    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.experts = _Experts(shape.ffn_experts, shape.d, shape.ffn_hidden)
        self.output_experts = _Experts(shape.ffn_experts, shape.ffn_hidden, shape.d)
        self.gate = _Gate(shape.d, shape.gating_size, shape.ffn_experts, shape.k)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        gates, layout, loss = self.gate(tokens)
        y = ffn(loop_product, tokens, self.experts.weight, self.output_experts.weight, layout, gates)
        return y.view_as(x), loss


class ReferenceBlock(nn.Module):
    """x += attention(norm(x)); x += ffn(norm(x)).

    Args:
        dense: shared by the layers of a model, as it holds matrices of the longest sequence squared.
    """

    def __init__(self, shape: LayerShape, dense: DenseStickAttention) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.d)
        self.attn = _Attention(shape, dense)
        self.ln_2 = nn.LayerNorm(shape.d)
        self.mlpf = _FFN(shape)

    def forward(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor, Past]:
        """x [B, T, D] -> x, the sum of both routing losses, and the concatenated keys and values."""
        attended, att_loss, present = self.attn(self.ln_1(x), past)
        x = x + attended
        transformed, ffn_loss = self.mlpf(self.ln_2(x))
        return x + transformed, att_loss + ffn_loss, present


class _Transformer(nn.Module):
    def __init__(self, shape: LayerShape, layers: int, vocab_size: int, dense: DenseStickAttention) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab_size, shape.d)
        self.h = nn.ModuleList(ReferenceBlock(shape, dense) for _ in range(layers))
        self.ln_f = nn.LayerNorm(shape.d)


class ReferenceModel(nn.Module):
    """Embedding, layers, norm, untied head. Build it on the meta device and load a state dict with ``assign=True``."""

    def __init__(self, shape: LayerShape, layers: int, vocab_size: int, dense: DenseStickAttention) -> None:
        super().__init__()
        self.transformer = _Transformer(shape, layers, vocab_size, dense)
        self.lm_head = nn.Linear(shape.d, vocab_size, bias=False)

    def forward(self, input_ids: Tensor, past: list[Past] | None = None) -> tuple[Tensor, list[Past]]:
        """input_ids [B, T] -> logits [B, T, V] fp32 and the cache of every layer."""
        x = self.transformer.wte(input_ids)
        presents = []
        for index, block in enumerate(self.transformer.h):
            x, _, present = block(x, past[index] if past is not None else None)
            presents.append(present)
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits.float(), presents
