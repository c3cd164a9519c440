"""Ours, dense formulations of it, and softmax attention of the same shape."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from moduleformer_ext import ops

from ..inputs import HEADS, ONE_HEAD, TWO_QUERIES, LayerShape, attention_inputs, live_tile_fraction, normal
from ..machine import DTYPES, Work
from ..peers.attention import (
    SDPA,
    DenseStickAttention,
    attention_peers,
    cumsum_stick_attention,
    softmax_attention,
    softmax_inputs,
)
from ..race import MEMORY, OURS, REFERENCE, Backward, Outputs, Race, Run, Tolerance, contestant

pytestmark = pytest.mark.benchmark(group="Stick-breaking attention")
DIRECTIONS = ("forward", "forward+backward")
LONGEST_DENSE = {0: 2048, 1: 512, 2: 2048}
"""By threads, 0 on a GPU: beyond it the dense formulations take more than 10 GB, or too many seconds."""
CHECKED_ROWS = 32
"""Checked where there is no dense formulation."""
EXACT = "ours, exact"
LOGITS = {"exact": 0.0, "early exit": 0.0, "long tail": -8.0}
"""The mean of the logits; their deviation is 1."""
TOLERANCES = {"fp32": Tolerance(1e-3), "bf16": Tolerance(0.1, quantile=0.99)}
GOALS = {("fp32", False): 1.15, ("fp32", True): 1.15, ("bf16", False): 1.5, ("bf16", True): 3.0}


def last_rows(q: Tensor, k: Tensor, v: Tensor, outputs: Outputs) -> tuple[Outputs, Outputs]:
    """The newest queries' rows, as they are and as they should be."""
    with torch.no_grad():
        wanted = cumsum_stick_attention(*(t.float() for t in (q[:, -CHECKED_ROWS:], k, v)))
    return {"y": outputs["y"][:, -CHECKED_ROWS:]}, {"y": wanted}


@pytest.mark.cases(
    "threads dtype direction tokens heads sticks",
    cpu=[
        *product([2], DTYPES, DIRECTIONS, [512, 1024, 2048, 4096], [TWO_QUERIES], ["exact"]),
        *product([1], DTYPES, DIRECTIONS, [512, 2048], [TWO_QUERIES], ["exact"]),
        *product([2], DTYPES, DIRECTIONS, [4096], [TWO_QUERIES], ["early exit", "long tail"]),
        *product([2], DTYPES, DIRECTIONS, [2048], [ONE_HEAD], ["exact"]),
    ],
    cuda=[
        *product([0], DTYPES, DIRECTIONS, [1024, 4096, 16384], HEADS, ["exact"]),
        *product([0], DTYPES, DIRECTIONS, [1024, 4096, 16384], HEADS[2:], ["early exit"]),
    ],
)
def test_stick_attention(
    run: Run,
    shape: LayerShape,
    threads: int,
    dtype: str,
    direction: str,
    tokens: int,
    heads: str,
    sticks: str,
) -> None:
    sizes, backward, exact = shape.attention(heads), direction != "forward", sticks == "exact"
    q, k, v = attention_inputs(tokens, **sizes, dtype=DTYPES[dtype], mean_logit=LOGITS[sticks])
    leaves = {"q": q, "k": k} if heads == ONE_HEAD else {"q": q, "k": k, "v": v}
    v = leaves.get("v", k)
    softmax = softmax_inputs(q, k, v)
    epsilon = 0.0 if exact else None
    facts = {"live tiles": live_tile_fraction(q, k, 0.0 if exact else 2.0**-24)}

    def differentiate(leaves: dict[str, Tensor]) -> Backward | None:
        cotangent = normal(*leaves["q"].shape, dtype=DTYPES[dtype], seed=5)
        return Backward(leaves, cotangent) if backward else None

    def ours(epsilon: float | None) -> Tensor:
        # [B, T, K, H, D] -> [B, T, H, K, D] and back: views
        return ops.stick_attention(q.transpose(2, 3), k, leaves.get("v"), stick_epsilon=epsilon).transpose(2, 3)

    train = differentiate(leaves)
    contestants = [contestant(OURS, partial(ours, epsilon), train)]
    oracle = None
    if exact and tokens <= LONGEST_DENSE[threads]:
        dense = DenseStickAttention(tokens, DTYPES[dtype])
        contestants.append(contestant(REFERENCE, partial(dense, q, k, v), train))
        contestants.append(contestant("cumsum", partial(cumsum_stick_attention, q, k, v), train))
    else:
        oracle = partial(last_rows, q, k, v)
    if not exact:
        contestants.append(contestant(EXACT, partial(ours, 0.0), train))
    for name, peer in attention_peers(sizes["k"]).items():
        contestants.append(contestant(name, peer.bound(q, k, v), train, comparable=peer.comparable))
    yardstick = differentiate(dict(zip("qkv", softmax, strict=True)))
    contestants.append(contestant(SDPA, partial(softmax_attention, *softmax), yardstick, comparable=False))

    goals = {}
    if threads and heads == TWO_QUERIES:
        goals = {
            "exact": {SDPA: GOALS[dtype, backward], MEMORY + SDPA: 1.0},
            "early exit": {SDPA: 5.0},
            "long tail": {EXACT: 1.0},
        }[sticks]
    # Two products forward, five more backward (scores again, dA, dV, dQ, dK), over the causal half.
    pairs = sizes["k"] * sizes["heads"] * tokens * (tokens + 1) / 2
    work = Work(DTYPES[dtype], 2 * sizes["head_dim"] * pairs * (7 if backward else 2))
    run(Race(contestants, TOLERANCES[dtype], work, goals, facts, oracle))
