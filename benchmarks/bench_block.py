"""A whole layer: mixture of attention heads and mixture of feed-forward experts, norms and residuals included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from .cells import (
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
from .inputs import LayerShape, layer_shape, normal
from .layers import our_block, reference_block
from .peers import jetmoe
from .pytest_cells import run_cell

SECTION = "block"
JETMOE = "JetMoE (softmax)"
JETMOE_LONGEST_BACKWARD = 512
# Some tokens tie at the top-k border and go to different experts, and so do tokens that attend to them.
TOLERANCES = {torch.float32: Tolerance(1e-3, quantile=0.95), torch.bfloat16: Tolerance(0.15, quantile=0.8)}
SPEEDUPS = {
    (torch.float32, False): {512: 4, 2048: 14},
    (torch.bfloat16, False): {512: 4, 2048: 25},
    (torch.float32, True): {512: 4, 2048: 10},
    (torch.bfloat16, True): {512: 3, 2048: 18},
}


def matrix_flops(shape: LayerShape, tokens: int) -> float:
    """Of a forward pass: routed projections, K/V projections, attention, experts, gates."""
    slots = tokens * shape.k
    projections = 2 * slots * 2 * shape.d * shape.att_hidden
    keys_values = 0 if shape.heads == 1 else 2 * tokens * 2 * shape.d * shape.att_hidden
    attention = 2 * 2 * shape.att_hidden * shape.k * tokens * (tokens + 1) / 2
    experts = 2 * slots * 2 * shape.d * shape.ffn_hidden
    gates = 2 * tokens * shape.gating_size * (2 * shape.d + shape.att_experts + shape.ffn_experts)
    return projections + keys_values + attention + experts + gates


def race(tokens: int, dtype: torch.dtype, *, quick: bool, backward: bool) -> Race:
    shape = layer_shape(quick)
    block = our_block(shape, dtype, stick_epsilon=0.0)
    reference = reference_block(block, shape, dtype, tokens)
    x = normal(1, tokens, shape.d, dtype=dtype)
    cotangent = normal(1, tokens, shape.d, dtype=dtype, seed=1)
    parameters = dict(block.named_parameters())
    leaves = {"x": x, **parameters}

    def contestant(
        name: str, function: Callable[[], Tensor], leaves: dict[str, Tensor], comparable: bool = True
    ) -> Contestant:
        if not backward:
            return forward_only(name, function, comparable=comparable)
        for leaf in leaves.values():
            leaf.requires_grad_()
        return forward_backward(name, function, leaves, cotangent, comparable=comparable)

    contestants = [
        contestant(OURS, lambda: block(x)[0], leaves),
        contestant(REFERENCE, lambda: reference(x)[0], leaves),
    ]
    if jetmoe.AVAILABLE and not (backward and tokens > JETMOE_LONGEST_BACKWARD):
        peer = jetmoe.JetMoeBlock(shape, dtype)
        contestants.append(contestant(JETMOE, partial(peer, x), {"x": x, **dict(peer.layer.named_parameters())}, False))
    read = sum(parameter.nbytes for parameter in parameters.values())
    work = Work(dtype, matrix_flops(shape, tokens) * (3 if backward else 1), read * (2 if backward else 1))
    return Race(tuple(contestants), work)


def cells(quick: bool = False) -> Iterator[Cell]:
    lengths = (32,) if quick else (512, 2048)
    for threads in (1, 2):
        for tokens in lengths if threads == 1 else lengths[:1]:
            for dtype in (torch.float32, torch.bfloat16):
                for backward in (False, True):
                    direction = "forward+backward" if backward else "forward"
                    title = f"{dtype_name(dtype)} {direction}, T {tokens}"
                    build = partial(race, tokens, dtype, quick=quick, backward=backward)
                    tags = {"dtype": dtype_name(dtype), "tokens": tokens, "direction": direction, "kind": ""}
                    goals: list[Goal] = []
                    if threads == 1 and not quick:
                        goals.append(Goal("speedup", SPEEDUPS[dtype, backward][tokens], REFERENCE))
                    if not backward:
                        goals.append(Goal("speedup", 1.0, JETMOE))
                    goals += [NOT_SLOWER, Goal("memory", 1.0, REFERENCE)]
                    yield Cell(SECTION, title, threads, build, TOLERANCES[dtype], tuple(goals), tags)


@pytest.mark.parametrize("cell", list(cells()), ids=lambda cell: cell.key)
def test_block(cell: Cell, benchmark: object) -> None:
    run_cell(cell, benchmark)
