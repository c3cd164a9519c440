"""Experts of 8 and 4 bits against the same in bf16 and float32: up and down, as a feed-forward layer has them."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
from torch import Tensor

from moduleformer_ext import ops
from moduleformer_ext.quantised import BITS, QuantisedMatrices, quantise
from moduleformer_ext.types import ExpertLayout

from ..inputs import LayerShape, expert_weights, normal, random_gates
from ..machine import DTYPES, Work, evict
from ..race import OURS, Race, Run, Tolerance, contestant

pytestmark = pytest.mark.benchmark(group="Quantised experts")
# Of the rounding of the numbers: 4 bits lose a tenth.
TOLERANCES = {8: Tolerance(0.05), 4: Tolerance(0.3)}
WHOLE = "experts as they were"


def _ffn(x: Tensor, up: QuantisedMatrices, down: QuantisedMatrices, layout: ExpertLayout, gates: Tensor) -> Tensor:
    hidden = ops.quantised_gemm(x, up, layout, activation="gelu_tanh")
    return ops.quantised_gemm(hidden, down, layout, x_order="expert", out_order="token", gates=gates)


@pytest.mark.cases("threads dtype tokens bits", cpu=[*product([1, 2], DTYPES, [1, 8, 512], BITS)], cuda=[])
def test_quantised_gemm(run: Run, shape: LayerShape, threads: int, dtype: str, tokens: int, bits: int) -> None:
    kind = DTYPES[dtype]
    x = normal(tokens, shape.d, dtype=kind)
    up = expert_weights(shape.ffn_experts, shape.d, shape.ffn_hidden, kind, seed=1)
    down = expert_weights(shape.ffn_experts, shape.ffn_hidden, shape.d, kind, seed=2)
    gates, expert_ids = random_gates(tokens, shape.ffn_experts, shape.k)
    layout = ops.expert_layout(expert_ids, shape.ffn_experts)
    quantised = quantise(up, bits), quantise(down, bits)
    contestants = [
        contestant(OURS, partial(_ffn, x, *quantised, layout, gates), prepare=evict),
        contestant(WHOLE, partial(ops.expert_ffn, x, up, down, layout, gates), prepare=evict),
    ]
    live = int((layout.counts > 0).sum())
    read = live * sum(t.nbytes for part in quantised for t in (part.values, part.scales)) // shape.ffn_experts
    work = Work(kind, 2 * 2 * tokens * shape.k * shape.d * shape.ffn_hidden, read)
    run(Race(contestants, TOLERANCES[bits], work))
