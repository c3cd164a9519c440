"""A layer of the library, a model of it, and the reference formulations on the same parameters."""

from __future__ import annotations

import torch
from torch import nn

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.nn import Block, MixtureOfAttention, MixtureOfFFN, make_router

from .inputs import LayerShape, randomize
from .peers.attention import DenseStickAttention
from .peers.block import ReferenceBlock, ReferenceModel


def our_block(shape: LayerShape, dtype: torch.dtype, *, stick_epsilon: float | None = None) -> Block:
    """One layer with random weights."""

    def router(experts: int) -> nn.Module:
        return make_router("mlp", shape.d, experts, shape.k, gating_size=shape.gating_size)

    with torch.device("meta"):
        attention = MixtureOfAttention(
            shape.d, shape.att_hidden, shape.heads, router(shape.att_experts), stick_epsilon=stick_epsilon
        )
        block = Block(shape.d, attention, MixtureOfFFN(shape.d, shape.ffn_hidden, router(shape.ffn_experts)))
    block = block.to(dtype).to_empty(device="cpu")
    randomize(block)
    return block


def reference_block(block: nn.Module, shape: LayerShape, dtype: torch.dtype, max_length: int) -> ReferenceBlock:
    """The reference formulation of ``block``, on its very parameters."""
    dense = DenseStickAttention(max_length, dtype)
    with torch.device("meta"):
        reference = ReferenceBlock(shape, dense)
    reference.load_state_dict(dict(block.named_parameters()), assign=True)
    return reference


def our_model(config: MoLMConfig, dtype: torch.dtype) -> MoLMForCausalLM:
    """A model with random weights, made in ``dtype`` from the start: no other copy ever exists."""
    with torch.device("meta"):
        model = MoLMForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    randomize(model)
    return model.eval()


def config_shape(config: MoLMConfig) -> LayerShape:
    """The sizes of a layer of ``config``, whose layers are all alike."""
    return LayerShape(
        d=config.n_embd,
        att_hidden=config.attention.hidden,
        heads=config.n_head,
        att_experts=config.num_experts("attention")[0],
        ffn_experts=config.num_experts("ffn")[0],
        ffn_hidden=config.ffn.hidden,
        k=config.ffn.k,
        gating_size=config.gating_size,
    )


def reference_model(model: MoLMForCausalLM, dtype: torch.dtype, max_length: int) -> ReferenceModel:
    """The reference formulation of ``model``, on its very parameters."""
    config, dense = model.config, DenseStickAttention(max_length, dtype)
    with torch.device("meta"):
        reference = ReferenceModel(config_shape(config), config.n_layer, config.vocab_size, dense)
    reference.load_state_dict(dict(model.named_parameters()), assign=True)
    return reference.eval()
