"""Experts of 8 and 4 bits against the same numbers in the dtype of x, and torch's own products of few bits.

A feed-forward layer's up and down, in the dtype that they would have otherwise: what few bits save is the reading.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from moduleformer_ext import ops
from moduleformer_ext.quantised import BITS, QuantisedMatrices, dequantise, quantise
from moduleformer_ext.types import ExpertLayout

from ..inputs import LayerShape, expert_weights, normal, random_gates
from ..machine import DTYPES, Work, evict
from ..race import OURS, Race, Run, Tolerance, contestant

pytestmark = pytest.mark.benchmark(group="Quantised experts")
TOLERANCES = {"fp32": Tolerance(1e-4), "bf16": Tolerance(0.05)}


def _ffn(x: Tensor, up: QuantisedMatrices, down: QuantisedMatrices, layout: ExpertLayout, gates: Tensor) -> Tensor:
    hidden = ops.quantised_gemm(x, up, layout, activation="gelu_tanh")
    return ops.quantised_gemm(hidden, down, layout, x_order="expert", out_order="token", gates=gates)


@pytest.mark.cases("threads dtype tokens bits", cpu=[*product([1, 2], DTYPES, [1, 8, 512], BITS)], cuda=[])
def test_quantised_gemm(run: Run, shape: LayerShape, threads: int, dtype: str, tokens: int, bits: int) -> None:
    kind = DTYPES[dtype]
    x = normal(tokens, shape.d, dtype=kind)
    gates, expert_ids = random_gates(tokens, shape.ffn_experts, shape.k)
    layout = ops.expert_layout(expert_ids, shape.ffn_experts)
    quantised = [
        quantise(expert_weights(shape.ffn_experts, rows, columns, kind, seed=seed), bits)
        for seed, (rows, columns) in enumerate(((shape.d, shape.ffn_hidden), (shape.ffn_hidden, shape.d)), 1)
    ]
    up, down = (dequantise(part).to(kind) for part in quantised)
    contestants = [
        contestant(OURS, partial(_ffn, x, *quantised, layout, gates), prepare=evict),
        contestant("the same numbers", partial(ops.expert_ffn, x, up, down, layout, gates), prepare=evict),
    ]
    if bits == 8 and kind == torch.bfloat16:
        peer = partial(_by_torch, x, *(_for_torch(part) for part in quantised), expert_ids, gates)
        contestants.append(contestant("torch, expert by expert", peer, prepare=evict))
    live = int((layout.counts > 0).sum())
    read = live * sum(t.nbytes for part in quantised for t in (part.values, part.scales)) // shape.ffn_experts
    work = Work(kind, 2 * 2 * tokens * shape.k * shape.d * shape.ffn_hidden, read)
    run(Race(contestants, TOLERANCES[dtype], work))


def _for_torch(weight: QuantisedMatrices) -> tuple[list[Tensor], list[Tensor]]:
    """Numbers [out, in] and scales [out] of every expert, which torch's product takes in bfloat16."""
    numbers = weight.values.transpose(1, 2).flatten(2)[..., : weight.out_features].transpose(1, 2)
    scales = weight.scales.flatten(1)[:, : weight.out_features].bfloat16()
    return [matrix.contiguous() for matrix in numbers], list(scales)


def _by_torch(
    x: Tensor,
    up: tuple[list[Tensor], list[Tensor]],
    down: tuple[list[Tensor], list[Tensor]],
    expert_ids: Tensor,
    gates: Tensor,
) -> Tensor:
    y = torch.zeros_like(x)
    for expert in expert_ids.unique().tolist():
        token, choice = (expert_ids == expert).nonzero(as_tuple=True)
        hidden = torch.ops.aten._weight_int8pack_mm(x[token], up[0][expert], up[1][expert])
        hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        out = torch.ops.aten._weight_int8pack_mm(hidden, down[0][expert], down[1][expert])
        y.index_add_(0, token, out * gates[token, choice, None].to(out.dtype))
    return y
