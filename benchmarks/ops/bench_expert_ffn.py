"""Feed-forward experts: up, tanh-GELU, down, gate, sum over k."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product

import pytest

from moduleformer_ext import ops

from ..inputs import LayerShape, expert_weights, normal, random_gates
from ..machine import DTYPES, Work, memory_given_back
from ..peers.experts import ffn_peers
from ..race import BEST_PEER, LIMIT, MEMORY, OURS, REFERENCE, Backward, Contestant, Race, Run, Tolerance, contestant

pytestmark = pytest.mark.benchmark(group="Feed-forward experts")
TOLERANCES = {"fp32": Tolerance(1e-4), "bf16": Tolerance(0.05)}
DIRECTIONS = ("forward", "forward+backward", "forward+backward into .grad")
FRESH = "forward+backward, fresh memory"
"""Gradients as a plain process has them, in memory that the system gives zeroed, page by page. A step of the same
contestant comes before each that is timed, as in training: what lay idle meanwhile, a virtual machine may have to ask
its host for, and that takes several times as long.
"""


def after_a_step(one: Contestant) -> Contestant:
    def prepare() -> None:
        one.prepared(one.run)()
        if one.prepare is not None:
            one.prepare()

    return replace(one, prepare=prepare)


GOALS = {
    ("fp32", "forward", 512): {BEST_PEER: 1.3},
    ("fp32", "forward", 2048): {BEST_PEER: 1.3, LIMIT: 1.5},
    ("bf16", "forward", 2048): {BEST_PEER: 2.0},
    ("bf16", "forward+backward", 2048): {BEST_PEER: 2.5},
}


@pytest.mark.cases(
    "threads dtype direction tokens",
    cpu=[
        *product([2], DTYPES, DIRECTIONS, [512, 2048]),
        *product([1], DTYPES, DIRECTIONS[:2], [2048]),
        *product([1], DTYPES, [FRESH], [512, 1024, 2048]),
    ],
    cuda=[*product([0], DTYPES, DIRECTIONS[:2], [512, 4096, 16384]), *product([0], DTYPES, ["forward"], [1])],
)
def test_expert_ffn(run: Run, shape: LayerShape, threads: int, dtype: str, direction: str, tokens: int) -> None:
    kind, backward = DTYPES[dtype], direction != "forward"
    x = normal(tokens, shape.d, dtype=kind)
    up = expert_weights(shape.ffn_experts, shape.d, shape.ffn_hidden, kind, seed=1)
    down = expert_weights(shape.ffn_experts, shape.ffn_hidden, shape.d, kind, seed=2)
    gates, expert_ids = random_gates(tokens, shape.ffn_experts, shape.k)
    inputs = x, up, down, ops.expert_layout(expert_ids, shape.ffn_experts), gates
    train = None
    if backward:
        leaves = {"x": x, "up": up, "down": down, "gates": gates}
        train = Backward(leaves, normal(tokens, shape.d, dtype=kind, seed=3), into_grad="into .grad" in direction)
    contestants = [contestant(OURS, partial(ops.expert_ffn, *inputs), train)]
    # JetMoE indexes its weight expert by expert; each index makes a whole gradient: 8 times slower than the rest.
    for name, peer in ffn_peers(jetmoe_experts=not (backward and (tokens > 512 or direction == FRESH))).items():
        contestants.append(contestant(name, peer.bound(*inputs), train))

    passes = 3 if backward else 1
    live_experts = int((inputs[3].counts > 0).sum())
    read = live_experts * 2 * shape.d * shape.ffn_hidden * x.element_size() * (2 if backward else 1)
    work = Work(kind, passes * 2 * 2 * tokens * shape.k * shape.d * shape.ffn_hidden, read)
    goals = {MEMORY + REFERENCE: 1.0, **GOALS.get((dtype, direction, tokens), {})} if threads else {}
    if direction == FRESH:
        contestants = [after_a_step(one) for one in contestants]
    with memory_given_back() if direction == FRESH else nullcontext():
        run(Race(contestants, TOLERANCES[dtype], work, goals))
