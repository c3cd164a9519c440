"""The two directions of a mixture of attention heads: queries out (map), heads in (reduce)."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest

from moduleformer_ext import ops

from ..inputs import LayerShape, expert_weights, normal, random_gates
from ..machine import DTYPES, Work
from ..peers.experts import PRODUCTS, moa_map, moa_reduce
from ..race import MEMORY, OURS, REFERENCE, Backward, Race, Run, Tolerance, contestant

pytestmark = pytest.mark.benchmark(group="Routed projections of the attention experts")
TOLERANCES = {"fp32": Tolerance(1e-4), "bf16": Tolerance(0.05)}


@pytest.mark.cases(
    "threads dtype way direction tokens",
    cpu=[*product([2], DTYPES, ["map", "reduce"], ["forward", "forward+backward"], [512, 2048])],
    cuda=[],
)
def test_grouped_gemm(
    run: Run, shape: LayerShape, threads: int, dtype: str, way: str, direction: str, tokens: int
) -> None:
    kind, backward = DTYPES[dtype], direction != "forward"
    gates, expert_ids = random_gates(tokens, shape.att_experts, shape.k)
    layout = ops.expert_layout(expert_ids, shape.att_experts)
    if way == "map":
        x, cotangent = (
            normal(tokens, shape.d, dtype=kind),
            normal(tokens, shape.k, shape.att_hidden, dtype=kind, seed=3),
        )
        weight = expert_weights(shape.att_experts, shape.d, shape.att_hidden, kind, seed=1)
        leaves = {"x": x, "weight": weight}
        inputs, layer = (x, weight, layout), moa_map
        ours = partial(ops.grouped_gemm, *inputs, x_order="token", out_order="slot")
    else:
        x, cotangent = (
            normal(tokens, shape.k, shape.att_hidden, dtype=kind),
            normal(tokens, shape.d, dtype=kind, seed=3),
        )
        weight = expert_weights(shape.att_experts, shape.att_hidden, shape.d, kind, seed=1)
        leaves = {"x": x, "weight": weight, "gates": gates}
        inputs, layer = (x, weight, layout, gates), moa_reduce
        ours = partial(ops.grouped_gemm, *inputs[:3], x_order="slot", out_order="token", gates=gates)
    train = Backward(leaves, cotangent) if backward else None
    contestants = [contestant(OURS, ours, train)]
    contestants += [contestant(name, partial(layer, p, *inputs), train) for name, p in PRODUCTS.items()]
    flops = 2 * tokens * shape.k * shape.d * shape.att_hidden * (3 if backward else 1)
    work = Work(kind, flops, weight.nbytes * (2 if backward else 1))
    run(Race(contestants, TOLERANCES[dtype], work, {MEMORY + REFERENCE: 1.0}))
