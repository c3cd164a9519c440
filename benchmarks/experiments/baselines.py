"""What MoLM is compared with: softmax attention with rotary positions, in its own blocks and in a dense Transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduleformer_ext.models import KVCache, MoLMConfig, MoLMForCausalLM
from moduleformer_ext.nn import LayerCache, MixtureOfAttention
from moduleformer_ext.surgery import count_parameters
from moduleformer_ext.surgery.anatomy import KINDS, expert_size, sites
from moduleformer_ext.types import RouteTopK

_ROTARY_BASE = 10000.0
_HEAD_DIM = 64


def rotate(x: Tensor, first: int) -> Tensor:
    """Rotary position embedding of x [B, T, H, D], whose first token stands at position ``first``."""
    half = x.shape[-1] // 2
    frequency = _ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(first, first + x.shape[1], device=x.device, dtype=torch.float32), frequency)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def causal_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [B, T, H, D] to k and v [B, S, H_kv, D], the last T of them at q's own positions."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    new, total = q.shape[2], k.shape[2]
    mask = None
    if 1 < new < total:
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    causal = 1 < new == total
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2)


class RotaryMixtureOfAttention(MixtureOfAttention):
    """MoLM's mixture of attention heads with softmax and rotary positions instead of stick-breaking."""

    def forward(
        self,
        x: Tensor,
        past: LayerCache | None = None,
        key_padding_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, RouteTopK, LayerCache | None]:
        """As :class:`MixtureOfAttention`, without padding."""
        if key_padding_mask is not None:
            raise ValueError("RotaryMixtureOfAttention: key_padding_mask must be None")
        first = 0 if past is None else past.length
        q, route, layout = self.q_proj(x.flatten(0, 1))  # [B T, K, H D]
        chosen = q.shape[1]
        heads = (self.n_head, self.head_dim)
        # Query heads that share a key head stand together: [B, T, H K, D].
        q = torch.unflatten(q.view(*x.shape[:2], *q.shape[1:]), -1, heads).transpose(2, 3).flatten(2, 3)
        k, v = (torch.unflatten(proj(x), -1, heads) for proj in (self.k_proj, self.v_proj))
        q, k = rotate(q, first), rotate(k, first)
        if past is None:
            present = LayerCache.of(k, v)
        else:
            k, values, present = past.extend(k, v)
            assert values is not None
            v = values
        o = causal_softmax(q, k, v).unflatten(2, (self.n_head, chosen)).transpose(2, 3).flatten(0, 1).flatten(2)
        y = self.q_proj.output_experts(o, layout, x_order="slot", out_order="token", gates=route.gates)
        return y.view_as(x), route, present if use_cache else None


def make_rotary_molm(config: MoLMConfig) -> MoLMForCausalLM:
    """MoLM with the attention of every block replaced; parameters keep their names and shapes."""
    model = MoLMForCausalLM(config)
    for block in model.transformer.h:
        attention = block.attn
        block.attn = RotaryMixtureOfAttention(
            config.n_embd, config.attention.hidden, config.n_head, attention.q_proj.gate
        )
        for name, module in attention.named_children():
            setattr(block.attn, name, module)
    return model


@dataclass(frozen=True)
class DenseConfig:
    """A pre-norm Transformer with rotary positions, GELU and no biases but the norms'."""

    vocab_size: int
    n_embd: int
    n_layer: int
    n_head: int
    ffd_hidden: int

    @property
    def num_parameters(self) -> int:
        """With the embedding and the head, which are two."""
        layer = 4 * self.n_embd**2 + 2 * self.n_embd * self.ffd_hidden + 4 * self.n_embd
        return 2 * self.vocab_size * self.n_embd + self.n_layer * layer + 2 * self.n_embd


@dataclass(kw_only=True)
class DenseOutput:
    """What the dense model computed."""

    logits: Tensor
    past_key_values: KVCache | None


class DenseBlock(nn.Module):
    """x += attention(norm(x)); x += ffn(norm(x))."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        d = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.up = nn.Linear(d, config.ffd_hidden, bias=False)
        self.down = nn.Linear(config.ffd_hidden, d, bias=False)

    def forward(self, x: Tensor, past: LayerCache | None) -> tuple[Tensor, LayerCache]:
        """x [B, T, D] and the past of this layer -> x and the longer past."""
        first = 0 if past is None else past.length
        q, k, v = self.qkv(self.ln_1(x)).unflatten(-1, (3, self.n_head, -1)).unbind(2)
        q, k = rotate(q, first), rotate(k, first)
        if past is None:
            present = LayerCache.of(k, v)
        else:
            k, v, present = past.extend(k, v)
        x = x + self.out(causal_softmax(q, k, v).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh")), present


class DenseForCausalLM(nn.Module):
    """The dense language model, with as much of MoLM's interface as the experiments need."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(DenseBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(
        self, input_ids: Tensor, *, past_key_values: KVCache | None = None, use_cache: bool = False
    ) -> DenseOutput:
        """input_ids [B, T] -> logits [B, T, V] float32."""
        x = self.wte(input_ids)
        presents = []
        for i, block in enumerate(self.h):
            x, present = block(x, None if past_key_values is None else past_key_values.layers[i])
            presents.append(present)
        return DenseOutput(
            logits=self.lm_head(self.ln_f(x)).float(), past_key_values=KVCache(presents) if use_cache else None
        )


Model = MoLMForCausalLM | DenseForCausalLM


def active_parameters(config: MoLMConfig) -> int:
    """Parameters that take part in one token: all but the experts it is not routed to."""
    idle = {kind: sum(s.num_experts(config) - s.k(config) for s in sites(config) if s.kind == kind) for kind in KINDS}
    return count_parameters(config) - sum(number * expert_size(config, kind) for kind, number in idle.items())


def dense_of_width(like: MoLMConfig, n_embd: int, num_parameters: int) -> DenseConfig:
    """A dense model as deep as ``like``; its feed-forward layer is as wide as the number of parameters leaves."""
    fields = {"n_layer": like.n_layer, "n_head": max(1, n_embd // _HEAD_DIM)}
    rest = num_parameters - DenseConfig(like.vocab_size, n_embd, ffd_hidden=0, **fields).num_parameters
    hidden = round(rest / (2 * n_embd * like.n_layer) / 8) * 8
    return DenseConfig(like.vocab_size, n_embd, ffd_hidden=hidden, **fields)


def dense_of_size(like: MoLMConfig, num_parameters: int) -> DenseConfig:
    """The dense model of so many parameters whose feed-forward layer is nearest to 4 times its width."""
    widths = range(_HEAD_DIM, 64 * _HEAD_DIM, _HEAD_DIM)
    candidates = [dense_of_width(like, width, num_parameters) for width in widths]
    fitting = [config for config in candidates if config.ffd_hidden >= config.n_embd]
    return min(fitting, key=lambda config: abs(config.ffd_hidden / config.n_embd - 4))
