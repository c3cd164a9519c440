"""The two directions of a mixture of attention heads: queries out (map), heads in (reduce)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from moduleformer_ext import ops

from ..cells import (
    NOT_SLOWER,
    OURS,
    REFERENCE,
    Cell,
    Contestant,
    Goal,
    Race,
    Tolerance,
    Work,
    dtype_name,
    forward_backward,
    forward_only,
)
from ..inputs import expert_weights, layer_shape, normal, random_gates
from ..peers.experts import PRODUCTS, ExpertProduct, moa_map, moa_reduce
from ..pytest_cells import run_cell

SECTION = "moa"
TOLERANCES = {torch.float32: Tolerance(1e-4), torch.bfloat16: Tolerance(0.05)}


def race(tokens: int, dtype: torch.dtype, *, quick: bool, way: str, backward: bool) -> Race:
    shape = layer_shape(quick)
    gates, expert_ids = random_gates(tokens, shape.att_experts, shape.k)
    layout = ops.expert_layout(expert_ids, shape.att_experts)
    if way == "map":
        x = normal(tokens, shape.d, dtype=dtype)
        weight = expert_weights(shape.att_experts, shape.d, shape.att_hidden, dtype, seed=1)
        leaves = {"x": x, "weight": weight}
        cotangent = normal(tokens, shape.k, shape.att_hidden, dtype=dtype, seed=3)
        ours: Callable[[], Tensor] = partial(ops.grouped_gemm, x, weight, layout, x_order="token", out_order="slot")
    else:
        x = normal(tokens, shape.k, shape.att_hidden, dtype=dtype)
        weight = expert_weights(shape.att_experts, shape.att_hidden, shape.d, dtype, seed=1)
        leaves = {"x": x, "weight": weight, "gates": gates}
        cotangent = normal(tokens, shape.d, dtype=dtype, seed=3)
        ours = partial(ops.grouped_gemm, x, weight, layout, x_order="slot", out_order="token", gates=gates)
    if backward:
        for leaf in leaves.values():
            leaf.requires_grad_()

    def contestant(name: str, function: Callable[[], Tensor]) -> Contestant:
        return forward_backward(name, function, leaves, cotangent) if backward else forward_only(name, function)

    def peer(product: ExpertProduct) -> Callable[[], Tensor]:
        if way == "map":
            return partial(moa_map, product, x, weight, layout)
        return partial(moa_reduce, product, x, weight, layout, gates)

    contestants = [contestant(OURS, ours), *(contestant(name, peer(product)) for name, product in PRODUCTS.items())]
    flops = 2 * tokens * shape.k * shape.d * shape.att_hidden * (3 if backward else 1)
    return Race(tuple(contestants), Work(dtype, flops, weight.nbytes * (2 if backward else 1)))


def cells(quick: bool = False) -> Iterator[Cell]:
    lengths = (32,) if quick else (512, 2048)
    for tokens in lengths:
        for dtype in (torch.float32, torch.bfloat16):
            for way in ("map", "reduce"):
                for backward in (False, True):
                    direction = "forward+backward" if backward else "forward"
                    title = f"{dtype_name(dtype)} {way} {direction}, T {tokens}"
                    build = partial(race, tokens, dtype, quick=quick, way=way, backward=backward)
                    tags = {"dtype": dtype_name(dtype), "tokens": tokens, "direction": direction, "kind": way}
                    goals = (NOT_SLOWER, Goal("memory", 1.0, REFERENCE))
                    yield Cell(SECTION, title, 2, build, TOLERANCES[dtype], goals, tags)


@pytest.mark.parametrize("cell", list(cells()), ids=lambda cell: cell.key)
def test_grouped_gemm(cell: Cell, benchmark: object) -> None:
    run_cell(cell, benchmark)
