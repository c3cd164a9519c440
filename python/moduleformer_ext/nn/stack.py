"""A stack of blocks for a few new tokens as one op: between the ops Python took longer than a small model's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from moduleformer_ext import ops
from moduleformer_ext.nn.block import Block
from moduleformer_ext.nn.cache import StaticLayerCache
from moduleformer_ext.nn.decode import TRAINING, Past, Weights, may_decode, serves, weights_of
from moduleformer_ext.nn.plain import Untouched, is_untouched
from moduleformer_ext.ops.blocks_decode import PackedBlocks, pack_blocks
from moduleformer_ext.types import BlockWeights


def decode_stack(
    blocks: nn.ModuleList,
    x: Tensor,
    pasts: Sequence[Any],
    key_padding_mask: Tensor | None,
    kind: type[Block] = Block,
) -> tuple[Tensor, list[Past]] | None:
    """What blocks make of x [B, T, D] after a past of each: the new x, and the caches of past and new tokens. None
    where the blocks must be called one by one, as they must for their routes, or if they are not of this kind, which
    does without gradients what :class:`Block` does.
    """
    if not may_decode(x):
        return None
    stack = _STACKS.get(blocks)
    if stack is None or not stack.holds():
        stack = _stack(blocks, kind)
        if stack is None:
            return None
        _STACKS[blocks] = stack
    if not stack.serves(x, pasts):
        return None
    first = pasts[0]
    if isinstance(first, StaticLayerCache):
        presents, lengths = list(pasts), [past.lengths for past in pasts]
    else:
        presents, lengths = map(list, zip(*(past.reserve(x.shape[1]) for past in pasts), strict=True))
    keys = [present.keys for present in presents]
    values = None if first.values is None else [present.values for present in presents]
    y = ops.blocks_decode(
        x, stack.packed, keys, values, lengths, key_padding_mask=key_padding_mask, stick_epsilon=stack.stick_epsilon
    )
    return y, presents


_OF_ROUTER = attrgetter("k", "order")
_OF_ATTENTION = attrgetter("stick_epsilon", "n_head", "head_dim")
_EPSILON = attrgetter("eps")
_ACTIVATION = attrgetter("activation")
_DTYPE = attrgetter("dtype")


class _Stack(NamedTuple):
    """What the op takes of blocks, for as long as their modules are untouched."""

    untouched: Untouched
    random: Sequence[nn.Module]
    """What draws random numbers in training."""
    blocks: Sequence[Weights]
    numbers: list[Any]
    """What is no weight, as it was when the blocks were packed."""
    norms: Sequence[Tensor]
    stick_epsilon: float | None
    packed: PackedBlocks

    def holds(self) -> bool:
        """Whether the blocks are what was packed."""
        return self.untouched.holds() and _numbers(self.blocks) == self.numbers

    def serves(self, x: Tensor, pasts: Sequence[Any]) -> bool:
        """Whether tokens x can be decoded after these pasts."""
        kind, dtype = type(pasts[0]), x.dtype
        return (
            len(pasts) == len(self.blocks)
            and all(type(past) is kind for past in pasts)
            and not any(map(TRAINING, self.random))
            and all(norm is dtype for norm in map(_DTYPE, self.norms))
            and all(serves(weights.attention.module, x, past) for weights, past in zip(self.blocks, pasts, strict=True))
        )


_STACKS: WeakKeyDictionary[nn.Module, _Stack] = WeakKeyDictionary()


def _numbers(blocks: Sequence[Weights]) -> list[Any]:
    inputs = [layer.input for weights in blocks for layer in (weights.attention, weights.ffn)]
    return [
        *map(_OF_ROUTER, [part.router for part in inputs]),
        *map(_EPSILON, [part.norm for part in inputs]),
        *map(_OF_ATTENTION, [weights.attention.module for weights in blocks]),
        *map(_ACTIVATION, [weights.ffn.module for weights in blocks]),
    ]


def _stack(blocks: nn.ModuleList, kind: type[Block]) -> _Stack | None:
    found = []
    for block in blocks:
        weights = weights_of(block) if isinstance(block, kind) and is_untouched(block, kind) else None
        if weights is None:
            return None
        gates = weights.attention.input.gate, weights.ffn.input.gate
        if any(gate.temperature is not None for gate in gates):  # their centroids are made anew for every token
            return None
        found.append(weights)
    if not found or len({weights.attention.module.stick_epsilon for weights in found}) > 1:
        return None
    try:
        packed = pack_blocks([_block_weights(weights) for weights in found])
    except ValueError:  # blocks that differ in more than their weights
        return None
    modules = [module for module in blocks.modules() if module is not blocks]
    return _Stack(
        Untouched(modules, blocks),
        [module for weights in found for module in weights.random],
        found,
        _numbers(found),
        [layer.input.weight for weights in found for layer in (weights.attention, weights.ffn)],
        found[0].attention.module.stick_epsilon,
        packed,
    )


def _block_weights(weights: Weights) -> BlockWeights:
    attention, ffn = weights.attention, weights.ffn
    routers = (layer.input.router_of(layer.input.weight.dtype) for layer in (attention, ffn))
    fields: Any = (next(routers), *attention.matrices, next(routers), *ffn.matrices, ffn.module.activation)
    return BlockWeights(*fields)
