"""One new token through one layer, against caches of growing length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moduleformer_ext.nn import Block, LayerCache

from .cells import NOT_SLOWER, OURS, REFERENCE, Cell, Contestant, Goal, Outputs, Race, Tolerance, Work, dtype_name
from .inputs import LayerShape, layer_shape, normal
from .layers import our_block, reference_block
from .live_tiles import live_keys
from .machine import evict
from .peers import jetmoe
from .peers.block import Past, ReferenceBlock
from .pytest_cells import run_cell

SECTION = "decode"
JETMOE = "JetMoE (softmax)"
OURS_SHORT = "ours, cache 512"
SHORT_CACHE = 512
STEPS = 256
"""Tokens to decode at most: more than there are rounds."""
TOLERANCES = {torch.float32: Tolerance(1e-3), torch.bfloat16: Tolerance(0.15)}


def active_bytes(shape: LayerShape, dtype: torch.dtype) -> int:
    """Weights that one token needs."""
    matrices = 2 * shape.k * shape.d * (shape.att_hidden + shape.ffn_hidden)
    matrices += 0 if shape.heads == 1 else 2 * shape.d * shape.att_hidden
    matrices += shape.gating_size * (2 * shape.d + shape.att_experts + shape.ffn_experts)
    return matrices * dtype.itemsize


class Decoder:
    """Calls ``step(x, past) -> (y, past)`` with one token after another, each continuing from the last."""

    def __init__(self, step: Callable[[Tensor, Any], tuple[Tensor, Any]], tokens: Tensor, past: Any) -> None:
        self.step, self.tokens, self.past, self.index = step, tokens, past, 0

    def __call__(self) -> Outputs:
        x = self.tokens[:, self.index : self.index + 1]
        self.index += 1
        with torch.no_grad():
            y, self.past = self.step(x, self.past)
        return {"y": y}


def _our_step(block: Block, x: Tensor, past: LayerCache) -> tuple[Tensor, LayerCache]:
    y, _, present = block(x, past, use_cache=True)
    assert present is not None
    return y, present


def _reference_step(block: ReferenceBlock, x: Tensor, past: Past) -> tuple[Tensor, Past]:
    y, _, present = block(x, past)
    return y, present


def _jetmoe_step(block: jetmoe.JetMoeBlock, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
    return block(x, cache), cache


def race(cached: int, dtype: torch.dtype, *, quick: bool, epsilon: float | None) -> Race:
    """``epsilon=0`` reads the whole cache. Otherwise sticks run out early, and ours against a cache of
    ``SHORT_CACHE`` tells whether the time still depends on its length.
    """
    shape = layer_shape(quick)
    block = our_block(shape, dtype, stick_epsilon=epsilon).eval()
    reference = reference_block(block, shape, dtype, cached + STEPS)
    tokens = normal(1, STEPS, shape.d, dtype=dtype)
    keys = normal(1, cached, shape.heads, shape.head_dim, dtype=dtype, seed=2)
    values = normal(1, cached, shape.heads, shape.head_dim, dtype=dtype, seed=3)

    def our_decoder(length: int) -> Decoder:
        cache = LayerCache(capacity=length + STEPS)
        _, _, past = cache.extend(keys[:, :length].contiguous(), values[:, :length].contiguous())
        return Decoder(partial(_our_step, block), tokens, past)

    contestants = [
        Contestant(OURS, our_decoder(cached), evict),
        Contestant(REFERENCE, Decoder(partial(_reference_step, reference), tokens, (keys, values)), evict),
    ]
    if epsilon is None and cached > SHORT_CACHE:
        contestants.append(Contestant(OURS_SHORT, our_decoder(SHORT_CACHE), evict, comparable=False))
    if jetmoe.AVAILABLE:
        peer = jetmoe.JetMoeBlock(shape, dtype)
        cache = peer.new_cache()
        cache.update(keys.transpose(1, 2), values.transpose(1, 2), 0)
        decoder = Decoder(partial(_jetmoe_step, peer), tokens, cache)
        contestants.append(Contestant(JETMOE, decoder, evict, comparable=False))

    with torch.no_grad():
        q = block.attn.q_proj(block.ln_1(tokens[0]))[0].unflatten(-1, (shape.heads, -1))
    live = live_keys(q[0], keys[0], 2.0**-24 if epsilon is None else epsilon)
    read = active_bytes(shape, dtype) + 2 * live * shape.att_hidden * dtype.itemsize
    return Race(tuple(contestants), Work(dtype, bytes_read=read), {"live keys": live})


def cells(quick: bool = False) -> Iterator[Cell]:
    lengths = (SHORT_CACHE // 8,) if quick else (SHORT_CACHE, 2048, 8192)
    for threads in (1,) if quick else (1, 2):
        for cached in lengths:
            for dtype in (torch.float32, torch.bfloat16):
                for case, epsilon in (("whole cache live", 0.0), ("sticks exhausted", None)):
                    title = f"{dtype_name(dtype)}, cache {cached}, {case}"
                    build = partial(race, cached, dtype, quick=quick, epsilon=epsilon)
                    tags = {"dtype": dtype_name(dtype), "tokens": cached, "direction": "decode", "kind": case}
                    goals = [Goal("roofline", 1.3), NOT_SLOWER]
                    if epsilon is None and cached > SHORT_CACHE:
                        goals.append(Goal("speedup", 0.95, OURS_SHORT))
                    yield Cell(SECTION, title, threads, build, TOLERANCES[dtype], tuple(goals), tags)


@pytest.mark.parametrize("cell", list(cells()), ids=lambda cell: cell.key)
def test_decode(cell: Cell, benchmark: object) -> None:
    run_cell(cell, benchmark)
