"""A whole stack of blocks for a few new tokens as one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moduleformer_ext.ops._layer_decode import expert_weight
from moduleformer_ext.ops._segments import segments
from moduleformer_ext.types import BlockWeights, NormedRouter

_OP = "blocks_decode"


class PackedBlocks(NamedTuple):
    """Blocks as the operator takes them, made by :func:`pack_blocks`. It holds the weights themselves, no copies."""

    gate: str
    order: str
    attention_k: int
    ffn_k: int
    attention_norm_epsilon: float
    ffn_norm_epsilon: float
    activation: str
    tensors: list[Tensor]
    """The weights of all blocks, in the order of the fields."""
    sizes: list[int]
    """How many of them each field of each block has."""
    formats: list[int]
    """Bits, inputs and outputs of each block's four matrices of experts; zeros where these are floating-point."""


def pack_blocks(blocks: Sequence[BlockWeights]) -> PackedBlocks:
    """Prepare blocks for :func:`blocks_decode`, once for any number of its calls.

    Raises:
        ValueError: no blocks, or blocks whose routers differ in kind, order, k or the norm's epsilon, or whose
            activations do.
    """
    if not blocks:
        raise ValueError(f"{_OP}: blocks must be at least one, got none")
    for i, block in enumerate(blocks):
        if not isinstance(block, BlockWeights):
            raise ValueError(f"{_OP}: blocks must be BlockWeights, got {type(block).__name__} at index {i}")
        for name in ("attention_router", "ffn_router"):
            if not isinstance(router := getattr(block, name), NormedRouter):
                raise ValueError(f"{_OP}: {name} must be a NormedRouter, got {type(router).__name__} in block {i}")
    common = [_common(block) for block in blocks]
    gate, order = common[0][:2]
    first = blocks[0]
    for i, (block, found) in enumerate(zip(blocks, common, strict=True)):
        if found != common[0] or (block.attention_router.gate, block.attention_router.order) != (gate, order):
            raise ValueError(
                f"{_OP}: blocks must have routers of one gate and order, and of the same k, norm_epsilon and "
                f"activation in every block, got {found} in block {i} beside {common[0]}"
            )
    tensors: list[Tensor] = []
    sizes: list[int] = []
    formats: list[int] = []

    def add(*fields: Sequence[Tensor] | Tensor | None) -> None:
        for field in fields:
            parts = [] if field is None else [field] if isinstance(field, Tensor) else field
            tensors.extend(parts)
            sizes.append(len(parts))

    def add_router(router: NormedRouter) -> None:
        rows = segments(_OP, "gate_weight", router.gate_weight)
        add(router.hidden_weight, router.hidden_bias, rows, router.norm_weight, router.norm_bias)

    def add_experts(block: BlockWeights, *names: str) -> None:
        for name in names:
            matrices, numbers = expert_weight(_OP, name, getattr(block, name))
            add(matrices)
            formats.extend(numbers or (0, 0, 0))

    for block in blocks:
        add_router(block.attention_router)
        add_experts(block, "query_weight", "output_weight")
        add(block.k_weight, block.k_bias, block.v_weight, block.v_bias)
        add_router(block.ffn_router)
        add_experts(block, "up", "down")
    attention, ffn = first.attention_router, first.ffn_router
    return PackedBlocks(
        *(gate, order, attention.k, ffn.k, attention.norm_epsilon, ffn.norm_epsilon, first.activation),
        *(tensors, sizes, formats),
    )


def _common(block: BlockWeights) -> tuple[Any, ...]:
    """What must be alike in all blocks."""
    attention, ffn = block.attention_router, block.ffn_router
    return ffn.gate, ffn.order, attention.k, ffn.k, attention.norm_epsilon, ffn.norm_epsilon, block.activation


def blocks_decode(
    x: Tensor,
    blocks: Sequence[BlockWeights] | PackedBlocks,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor] | None,
    cache_lengths: Sequence[Tensor],
    *,
    key_padding_mask: Tensor | None = None,
    stick_epsilon: float | None = None,
) -> Tensor:
    """A few new tokens through a stack of blocks, one after the other, in one call.

    Of every block :func:`~moduleformer_ext.ops.attention_layer_decode`, then
    :func:`~moduleformer_ext.ops.ffn_layer_decode`, to the bit. There is no gradient.

    Args:
        x: ``[B, T, D]`` float32, float64, bfloat16 or float16.
        blocks: the blocks' weights, or what :func:`moduleformer_ext.ops.blocks_decode.pack_blocks` made of them:
            packing takes longer than a small block.
        k_caches, v_caches, cache_lengths: of every block what attention_layer_decode takes, changed in place;
            ``v_caches`` is None where keys are the values.
        key_padding_mask: ``[B, S_max]`` bool, of all caches.
        stick_epsilon: as in :func:`~moduleformer_ext.ops.stick_attention_decode`, of all blocks.

    Returns:
        y ``[B, T, D]`` in x's dtype.

    Raises:
        ValueError: naming the argument, and the block if it is of one, for another shape, dtype, device or stride, and
            in grad mode for an input that requires grad. On a CPU for tokens that do not fit into a cache. No cache has
            been written then; elsewhere lengths are not read, and such tokens overwrite the last place.
    """
    if not isinstance(blocks, PackedBlocks):
        blocks = pack_blocks(blocks)
    return torch.ops.moduleformer_ext.blocks_decode.default(
        x,
        *blocks,
        k_caches,
        () if v_caches is None else v_caches,
        cache_lengths,
        key_padding_mask,
        stick_epsilon,
    )
