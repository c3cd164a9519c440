"""Hugging Face's JetMoE, ModuleFormer's successor: softmax attention with RoPE, gated experts, RMSNorm.

``transformers`` is an optional dependency (``pip install .[peers]``): without it these contestants are left out.
A JetMoE layer is a yardstick, not the same function; its experts alone are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from moduleformer_ext.types import ExpertLayout

from ..inputs import LayerShape, randomize

AVAILABLE = importlib.util.find_spec("transformers") is not None


def _modeling() -> Any:
    from transformers.models.jetmoe import modeling_jetmoe

    return modeling_jetmoe


def expert_product(rows: Tensor, weight: Tensor, layout: ExpertLayout) -> Tensor:
    """JetMoE's expert layer on a weight [E, in, out] of ours, seen as its [E, out, in]."""
    with torch.device("meta"):
        layer = _modeling().JetMoeParallelExperts(*weight.shape)
    del layer.weight
    layer.weight = weight.transpose(1, 2)
    return layer(rows, layout.counts.tolist())


def gate(weight: Tensor, k: int) -> Callable[[Tensor], Any]:
    """JetMoE's router and slot sort: linear gate weight [E, D], top-k before the softmax, no loss sums."""
    experts, width = weight.shape
    with torch.device("meta"):
        layer = _modeling().JetMoeTopKGating(width, experts, k)
    layer.layer.weight = nn.Parameter(weight)
    return layer


def config(shape: LayerShape, *, layers: int = 1, vocab_size: int = 32, max_length: int = 16384) -> Any:
    """The layer of ``shape`` in JetMoE's terms. Its gated experts have three matrices for our two: with two thirds of
    the width (down to a multiple of 32) they cost the same arithmetic and memory traffic.
    """
    from transformers import JetMoeConfig

    jetmoe = JetMoeConfig(
        vocab_size=vocab_size,
        hidden_size=shape.d,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads * shape.k,
        num_key_value_heads=shape.heads,
        kv_channels=shape.head_dim,
        intermediate_size=shape.ffn_hidden * 2 // 3 // 32 * 32,
        num_local_experts=shape.ffn_experts,
        num_experts_per_tok=shape.k,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    jetmoe._attn_implementation = "sdpa"
    return jetmoe


def layer(shape: LayerShape, dtype: torch.dtype, index: int = 0, *, max_length: int = 16384) -> nn.Module:
    """A JetMoE decoder layer; its attention has its own number of experts, as ours."""
    modeling = _modeling()
    ours = config(shape, max_length=max_length)
    with torch.device("meta"):
        decoder = modeling.JetMoeDecoderLayer(ours, index)
        attention_config = copy(ours)
        attention_config.num_local_experts = shape.att_experts
        decoder.self_attention = modeling.JetMoeAttention(attention_config, index)
    decoder = decoder.to(dtype).to_empty(device="cpu")
    randomize(decoder)
    return decoder.eval()


class JetMoeBlock:
    """A decoder layer with its rotary embedding, called like a block: x [1, T, D] -> [1, T, D].

    With ``use_cache`` every call appends its tokens to a cache that grows by concatenation.
    """

    def __init__(self, shape: LayerShape, dtype: torch.dtype, *, max_length: int = 16384) -> None:
        from transformers.cache_utils import DynamicCache

        jetmoe = config(shape, max_length=max_length)
        self.layer = layer(shape, dtype, max_length=max_length)
        self.rotary = _modeling().JetMoeRotaryEmbedding(jetmoe)
        self.new_cache = lambda: DynamicCache(config=jetmoe)

    def __call__(self, x: Tensor, cache: Any = None) -> Tensor:
        past = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(past, past + x.shape[1])[None]
        return self.layer(x, position_embeddings=self.rotary(x, positions), past_key_values=cache)


def model(shape: LayerShape, layers: int, vocab_size: int, dtype: torch.dtype, *, distinct_layers: int) -> nn.Module:
    """A JetMoE language model. Its layers take turns with ``distinct_layers`` sets of weights, to save memory; enough
    of them that no cache holds what a pass reads.
    """
    modeling = _modeling()
    jetmoe = config(shape, layers=layers, vocab_size=vocab_size)
    with torch.device("meta"):
        causal = modeling.JetMoeForCausalLM(jetmoe)
    sets = [layer(shape, dtype) for _ in range(distinct_layers)]
    for index in range(layers):
        causal.model.layers[index] = _with_index(sets[index % distinct_layers], index)
    for module in (causal.model.embed_tokens, causal.model.norm, causal.lm_head):
        module.to(dtype).to_empty(device="cpu")
        randomize(module)
    causal.model.rotary_emb = modeling.JetMoeRotaryEmbedding(jetmoe)
    return causal.eval()


def _with_index(decoder: nn.Module, index: int) -> nn.Module:
    """The same layer under another cache index: modules are shallow copies, parameters the same."""
    twin = copy(decoder)
    twin._modules = dict(decoder._modules)
    attention = copy(decoder.self_attention)
    attention.layer_idx = index
    twin._modules["self_attention"] = attention
    return twin
