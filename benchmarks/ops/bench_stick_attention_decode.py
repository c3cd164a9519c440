"""One query against a cache: ours, the dense formulation, and softmax attention of the same shape."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from moduleformer_ext import ops, reference

from ..cells import NOT_SLOWER, OURS, REFERENCE, Cell, Goal, Race, Tolerance, Work, dtype_name, forward_only
from ..inputs import layer_shape, normal
from ..live_tiles import live_keys
from ..pytest_cells import run_cell

SECTION = "attention-decode"
SDPA = "SDPA (softmax)"
TOLERANCES = {torch.float32: Tolerance(1e-3), torch.bfloat16: Tolerance(2e-2)}


def race(cached: int, dtype: torch.dtype, *, k: int, heads: int, head_dim: int, epsilon: float | None) -> Race:
    """K queries per key head. One head: the keys are the values, as in the published models."""
    q = normal(1, 1, heads, k, head_dim, dtype=dtype)
    keys = normal(1, cached, heads, head_dim, dtype=dtype, seed=2)
    values = None if heads == 1 else normal(1, cached, heads, head_dim, dtype=dtype, seed=3)
    lengths = torch.tensor([cached], dtype=torch.int32)
    softmax_k = keys.transpose(1, 2)
    softmax_v = softmax_k if values is None else values.transpose(1, 2)
    softmax = partial(torch.nn.functional.scaled_dot_product_attention, q[0], softmax_k, softmax_v)

    contestants = (
        forward_only(OURS, partial(ops.stick_attention_decode, q, keys, values, lengths, stick_epsilon=epsilon)),
        forward_only(REFERENCE, partial(reference.stick_attention_decode, q, keys, values, lengths)),
        forward_only(SDPA, softmax, comparable=False),
    )
    live = live_keys(q[0, 0].transpose(0, 1), keys[0], 2.0**-24 if epsilon is None else epsilon)
    read = live * heads * head_dim * dtype.itemsize * (1 if values is None else 2)
    return Race(contestants, Work(dtype, bytes_read=read), {"live keys": live})


def cells(quick: bool = False) -> Iterator[Cell]:
    shape = layer_shape(quick)
    heads = {
        f"one head of {shape.att_hidden}, V is K": {"heads": 1, "head_dim": shape.att_hidden},
        f"{shape.heads} heads of {shape.head_dim}": {"heads": shape.heads, "head_dim": shape.head_dim},
    }
    for threads in (1, 2):
        for cached in (64,) if quick else (512, 8192):
            for dtype in (torch.float32, torch.bfloat16):
                for name, sizes in heads.items():
                    for case, epsilon in (("ε = 0", 0.0), ("early exit", None)):
                        title = f"{dtype_name(dtype)}, cache {cached}, {name}, {case}"
                        build = partial(race, cached, dtype, k=shape.k, epsilon=epsilon, **sizes)
                        tags = {"dtype": dtype_name(dtype), "tokens": cached, "direction": "decode", "kind": case}
                        goals = (NOT_SLOWER, Goal("speedup", 1.0, SDPA))
                        yield Cell(SECTION, title, threads, build, TOLERANCES[dtype], goals, tags)


@pytest.mark.parametrize("cell", list(cells()), ids=lambda cell: cell.key)
def test_stick_attention_decode(cell: Cell, benchmark: object) -> None:
    run_cell(cell, benchmark)
