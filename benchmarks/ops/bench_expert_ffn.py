"""Feed-forward experts: up, tanh-GELU, down, gate, sum over k."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    Peer,
    Race,
    Tolerance,
    Work,
    dtype_name,
    forward_backward,
    forward_only,
)
from ..inputs import expert_weights, layer_shape, normal, random_gates
from ..peers import jetmoe
from ..peers.experts import PRODUCTS, ffn
from ..pytest_cells import run_cell

SECTION = "ffn"
TOLERANCES = {torch.float32: Tolerance(1e-4), torch.bfloat16: Tolerance(0.05)}


def race(
    tokens: int,
    dtype: torch.dtype,
    *,
    quick: bool,
    backward: bool,
    into_grad: bool,
    peers: Mapping[str, Peer] | None = None,
) -> Race:
    """The contestants of one cell; ``peers`` take x, up, down, the layout and the gates."""
    shape = layer_shape(quick)
    x = normal(tokens, shape.d, dtype=dtype)
    up = expert_weights(shape.ffn_experts, shape.d, shape.ffn_hidden, dtype, seed=1)
    down = expert_weights(shape.ffn_experts, shape.ffn_hidden, shape.d, dtype, seed=2)
    gates, expert_ids = random_gates(tokens, shape.ffn_experts, shape.k)
    layout = ops.expert_layout(expert_ids, shape.ffn_experts)
    cotangent = normal(tokens, shape.d, dtype=dtype, seed=3)
    leaves = {"x": x, "up": up, "down": down, "gates": gates}
    if backward:
        for leaf in leaves.values():
            leaf.requires_grad_()

    def contestant(name: str, function: Callable[[], Tensor]) -> Contestant:
        if backward:
            return forward_backward(name, function, leaves, cotangent, into_grad=into_grad)
        return forward_only(name, function)

    products = dict(PRODUCTS)
    # JetMoE indexes its weight expert by expert; each index makes a whole gradient: 8 times slower than the rest.
    if jetmoe.AVAILABLE and not (backward and tokens > 512):
        products["JetMoE"] = jetmoe.expert_product
    contestants = [contestant(OURS, partial(ops.expert_ffn, x, up, down, layout, gates))]
    contestants += [
        contestant(name, partial(ffn, product, x, up, down, layout, gates)) for name, product in products.items()
    ]
    for name, peer in (peers or {}).items():
        contestants.append(contestant(name, peer.bind(x, up, down, layout, gates)))
    flops = 2 * 2 * tokens * shape.k * shape.d * shape.ffn_hidden * (3 if backward else 1)
    live_weights = int((layout.counts > 0).sum()) * 2 * shape.d * shape.ffn_hidden * x.element_size()
    return Race(tuple(contestants), Work(dtype, flops, live_weights * (2 if backward else 1)))


def cells(quick: bool = False) -> Iterator[Cell]:
    lengths = (32,) if quick else (512, 2048)
    modes = [(False, False), (True, False), (True, True)]
    for threads in (2, 1):
        for tokens in lengths if threads == 2 else lengths[-1:]:
            for dtype in (torch.float32, torch.bfloat16):
                for backward, into_grad in modes if threads == 2 else modes[:2]:
                    direction = "forward+backward" if backward else "forward"
                    title = f"{dtype_name(dtype)} {direction}, T {tokens}" + (", into .grad" if into_grad else "")
                    build = partial(race, tokens, dtype, quick=quick, backward=backward, into_grad=into_grad)
                    tags = {
                        "dtype": dtype_name(dtype),
                        "tokens": tokens,
                        "direction": direction,
                        "kind": "into .grad" if into_grad else "",
                    }
                    goals = (*_goals(tokens, dtype, backward, into_grad), NOT_SLOWER, Goal("memory", 1.0, REFERENCE))
                    yield Cell(SECTION, title, threads, build, TOLERANCES[dtype], goals, tags)


def _goals(tokens: int, dtype: torch.dtype, backward: bool, into_grad: bool) -> tuple[Goal, ...]:
    if into_grad:
        return ()
    if dtype == torch.float32:
        if backward:
            return ()
        return (Goal("speedup", 1.3, "best peer"), *((Goal("roofline", 1.5),) if tokens == 2048 else ()))
    return (Goal("speedup", 2.5 if backward else 2.0, "best peer"),) if tokens == 2048 else ()


@pytest.mark.parametrize("cell", list(cells()), ids=lambda cell: cell.key)
def test_expert_ffn(cell: Cell, benchmark: object) -> None:
    run_cell(cell, benchmark)
