"""Shapes and random inputs that the benchmarks share, and how much of an attention matrix they make visible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moduleformer_ext.models import MoLMConfig

TWO_QUERIES = "two queries per key"
ONE_HEAD = "one head"
"""Its keys are its values, as in the published models."""
HEADS = (TWO_QUERIES, ONE_HEAD, "heads of 64", "heads of 128")


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one layer."""

    d: int = 1024
    att_hidden: int = 1024
    heads: int = 16
    att_experts: int = 16
    ffn_experts: int = 32
    ffn_hidden: int = 2048
    k: int = 2
    gating_size: int = 256
    vocab_size: int = 50304

    @classmethod
    def of(cls, config: MoLMConfig) -> LayerShape:
        """Of the first layer of a model."""
        return cls(
            d=config.n_embd,
            att_hidden=config.attention.hidden,
            heads=config.n_head,
            att_experts=config.num_experts("attention")[0],
            ffn_experts=config.num_experts("ffn")[0],
            ffn_hidden=config.ffn.hidden,
            k=config.ffn.k,
            gating_size=config.gating_size,
            vocab_size=config.vocab_size,
        )

    @property
    def head_dim(self) -> int:
        return self.att_hidden // self.heads

    def attention(self, heads: str) -> dict[str, int]:
        """K, H and D of one of the kinds of heads (HEADS)."""
        if heads == TWO_QUERIES:
            return {"k": self.k, "heads": self.heads, "head_dim": self.head_dim}
        if heads == ONE_HEAD:
            return {"k": self.k, "heads": 1, "head_dim": self.att_hidden}
        dim = int(heads.removeprefix("heads of "))
        return {"k": 1, "heads": 2 * self.d // dim, "head_dim": dim}


MOLM_4B_K2 = LayerShape()
"""A layer of MoLM-4B-K2, its attention with 16 K/V heads of 64 (the published checkpoints have one of 1024)."""

TINY = LayerShape(
    d=64, att_hidden=64, heads=2, att_experts=4, ffn_experts=4, ffn_hidden=96, gating_size=32, vocab_size=256
)
"""For smoke tests."""


def generator(seed: int = 0) -> torch.Generator:
    """Of the default device, where inputs are made."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def normal(*size: int, dtype: torch.dtype = torch.float32, std: float = 1.0, seed: int = 0) -> Tensor:
    return (torch.randn(*size, generator=generator(seed)) * std).to(dtype)


def attention_inputs(
    tokens: int, k: int, heads: int, head_dim: int, dtype: torch.dtype, *, mean_logit: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, T, K, H, D] as a routed projection lays it out, k and v [1, T, H, D], with logits near
    N(mean_logit, 1).
    """
    q = normal(1, tokens, k, heads, head_dim, seed=1)
    keys = normal(1, tokens, heads, head_dim, seed=2)
    values = normal(1, tokens, heads, head_dim, dtype=dtype, seed=3)
    if mean_logit:
        # One dimension carries the mean, exactly: q_0 k_0 / sqrt(D) = mean_logit.
        size = (abs(mean_logit) * head_dim**0.5) ** 0.5
        q[..., 0], keys[..., 0] = size, size * (1 if mean_logit > 0 else -1)
    return q.to(dtype), keys.to(dtype), values


def random_gates(tokens: int, experts: int, k: int) -> tuple[Tensor, Tensor]:
    """gates [T, K] fp32 and expert_ids [T, K] int32 of a random routing."""
    probs = normal(tokens, experts, seed=4).softmax(-1)
    gates, ids = probs.topk(k, dim=-1)
    return gates.contiguous(), ids.int()


def fill_uniform_(tensor: Tensor, bound: float, seed: int) -> Tensor:
    """Fill with U(-bound, bound), cheaply enough for billions of elements: one block of draws, over and over. Its
    length is prime, so that no two rows or experts come out alike.
    """
    draws = (torch.rand(65_537, generator=generator(seed)) * 2 - 1) * bound
    flat = tensor.view(-1)
    whole = flat.numel() // len(draws) * len(draws)
    flat[:whole].view(-1, len(draws)).copy_(draws)
    flat[whole:].copy_(draws[: flat.numel() - whole])
    return tensor


def expert_weights(experts: int, rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[E, rows, columns] of variance 1 / rows, so that products keep the scale of their input."""
    return fill_uniform_(torch.empty(experts, rows, columns, dtype=dtype), (3 / rows) ** 0.5, seed)


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Weights under which activations keep their scale and tokens spread over all experts (a model's own
    initialisation is so small that next to nothing would flow).
    """
    for index, (name, parameter) in enumerate(module.named_parameters()):
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            fan_in = parameter.shape[-2] if parameter.dim() == 3 else parameter.shape[-1]
            fill_uniform_(parameter, (3 / fan_in) ** 0.5, seed=index)


@torch.no_grad()
def live_tile_fraction(
    q: Tensor, k: Tensor, epsilon: float, *, tile: int = 64, max_heads: int = 2, scale: float | None = None
) -> float:
    """The share of causal (query tile, key tile) pairs, ``tile`` tokens each, that some row of the query tile enters
    with more than ``epsilon`` of its stick.

    q [B, T, K, H, D], k [B, T, H, D]. Counted on the first ``max_heads`` heads of the first sequence: random inputs
    make all heads alike.
    """
    if epsilon == 0:
        return 1.0
    tokens, _, heads, dim = q.shape[1:]
    scale = dim**-0.5 if scale is None else scale
    tiles = -(-tokens // tile)
    live = 0
    visited_heads = min(heads, max_heads)
    positions = torch.arange(tokens, device=q.device)
    for head in range(visited_heads):
        keys = k[0, :, head].float()
        for index in range(tiles):
            rows = slice(index * tile, min(tokens, (index + 1) * tile))
            seen = rows.stop
            logits = torch.einsum("tkd,sd->tks", q[0, rows, :, head].float(), keys[:seen]) * scale
            visible = positions[:seen] <= positions[rows, None]
            log_leave = F.logsigmoid(-logits).masked_fill(~visible[:, None], 0)
            padded = F.pad(log_leave, (0, (index + 1) * tile - seen)).unflatten(-1, (index + 1, tile)).sum(-1)
            # log of what is left at each tile's right edge: the sum over the newer tiles
            left = (padded.flip(-1).cumsum(-1) - padded.flip(-1)).exp()
            live += int((left > epsilon).any(0).any(0).sum())
    return live / (visited_heads * tiles * (tiles + 1) / 2)


@torch.no_grad()
def live_keys(q: Tensor, k: Tensor, epsilon: float, *, scale: float | None = None) -> int:
    """How many of the newest keys the neediest head of one query reads before no more than ``epsilon`` of its stick is
    left. q [K, H, D], k [S, H, D] with S >= 1.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    log_leave = F.logsigmoid(torch.einsum("khd,shd->khs", q.float(), k.float()) * -scale)
    left_before = (log_leave.flip(-1).cumsum(-1) - log_leave.flip(-1)).exp()
    return int((left_before > epsilon).flatten(0, 1).any(0).sum()) if epsilon > 0 else k.shape[0]
