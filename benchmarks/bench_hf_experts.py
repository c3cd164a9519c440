"""The experts of a Mixtral in transformers, whole and quantised: our implementation, those that come with it, and the
CPU backend of ggml (llama.cpp) and kt-kernel on the same matrices, where `--peer-python` names a Python that has them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from moduleformer_ext import ops
from moduleformer_ext.quantised import BITS, QuantisedMatrices, quantise
from moduleformer_ext.types import ExpertLayout

from .conftest import PeersApart
from .inputs import LayerShape, expert_weights, normal, random_gates
from .machine import DTYPES, Work
from .race import BEST_PEER, OURS, Backward, Race, Run, Tolerance, contestant

moe = pytest.importorskip("transformers.integrations.moe")

pytestmark = pytest.mark.benchmark(group="Experts of transformers")
# The others round to bfloat16 between all steps, so that a single sum may lose a bit or two.
TOLERANCES = {"fp32": Tolerance(1e-4), "bf16": Tolerance(0.05, quantile=0.95)}
# By bits: the formats of others, and how far they may be from ours. Each rounds the matrices by a rule of its own, and
# the kernels of others round x to 8 bits, too.
PRECISIONS: dict[int, tuple[dict[str, str], Tolerance]] = {
    8: ({"ggml": "q8_0", "kt-kernel": "int8"}, Tolerance(0.1)),
    4: ({"ggml": "q4_0"}, Tolerance(0.35)),
}
MOST_EXPERTS = 8
"""Eager's backward makes a gradient of all experts for each of them."""
MOST_TOKENS_BATCHED = 16
"""batched_mm copies the matrices for every slot."""


def experts_of(shape: LayerShape, dtype: torch.dtype) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts = min(MOST_EXPERTS, shape.ffn_experts)
    config = MixtralConfig(hidden_size=shape.d, intermediate_size=shape.ffn_hidden, num_local_experts=experts)
    with torch.device("meta"):
        module = MixtralExperts(config)
    up = expert_weights(experts, shape.d, 2 * shape.ffn_hidden, dtype, seed=1)
    down = expert_weights(experts, shape.ffn_hidden, shape.d, dtype, seed=2)
    module.gate_up_proj = nn.Parameter(up.transpose(1, 2).contiguous(), requires_grad=False)
    module.down_proj = nn.Parameter(down.transpose(1, 2).contiguous(), requires_grad=False)
    return module


def inputs_apart(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
    gate, up = module.gate_up_proj.chunk(2, dim=1)
    return {"gate": gate, "up": up, "down": module.down_proj, "x": x, "ids": ids, "weights": weights}


@pytest.mark.cases(
    "threads dtype direction tokens",
    cpu=[*product([2, 1], DTYPES, ("forward", "forward+backward"), [1, 16, 512, 2048, 4096])],
    cuda=[*product([0], DTYPES, ("forward", "forward+backward"), [1, 16, 512, 2048, 4096])],
)
def test_hf_experts(
    run: Run, peers_apart: PeersApart, shape: LayerShape, threads: int, dtype: str, direction: str, tokens: int
) -> None:
    from moduleformer_ext.hf.experts import experts_forward

    kind, backward = DTYPES[dtype], direction != "forward"
    module = experts_of(shape, kind)
    x = normal(tokens, shape.d, dtype=kind)
    weights, ids = random_gates(tokens, module.num_experts, shape.k)
    ids = ids.long()
    train = None
    if backward:
        leaves: dict[str, Tensor] = {
            "x": x,
            "up": module.gate_up_proj,
            "down": module.down_proj,
            "weights": weights,
        }
        train = Backward(leaves, normal(tokens, shape.d, dtype=kind, seed=3))
    functions = {
        OURS: experts_forward,
        "eager": type(module).forward.__wrapped__,
        "grouped_mm": moe.grouped_mm_experts_forward,
    }
    if tokens <= MOST_TOKENS_BATCHED:
        functions["batched_mm"] = moe.batched_mm_experts_forward
    contestants = [contestant(name, partial(f, module, x, ids, weights), train) for name, f in functions.items()]
    if not backward and threads == 1:  # with more, our waiting threads would hinder theirs
        precisions = {"ggml": dtype} | ({"kt-kernel": dtype} if kind == torch.bfloat16 else {})
        contestants += peers_apart(precisions, inputs_apart(module, x, ids, weights))
    passes = 3 if backward else 1
    per_slot = 3 * shape.d * shape.ffn_hidden
    read = len(ids.unique()) * per_slot * x.element_size() * (2 if backward else 1)
    work = Work(kind, passes * 2 * tokens * shape.k * per_slot, read)
    run(Race(contestants, TOLERANCES[dtype], work, {BEST_PEER: 1.3} if threads and tokens >= 512 else {}))


def quantised_ffn(
    x: Tensor, up: QuantisedMatrices, down: QuantisedMatrices, layout: ExpertLayout, gates: Tensor
) -> Tensor:
    hidden = ops.quantised_gemm(x, up, layout, activation="swiglu")
    return ops.quantised_gemm(hidden, down, layout, x_order="expert", out_order="token", gates=gates)


@pytest.mark.benchmark(group="Quantised experts of a Mixtral")
@pytest.mark.cases("threads bits tokens", cpu=[*product([1], BITS, [1, 16, 512])], cuda=[])
def test_hf_quantised_experts(
    run: Run, peers_apart: PeersApart, shape: LayerShape, threads: int, bits: int, tokens: int
) -> None:
    from moduleformer_ext.hf.experts import experts_forward

    kind, panel = torch.bfloat16, 64  # quantised_gemm's activations with a gate take whole panels
    shape = replace(shape, ffn_hidden=shape.ffn_hidden // panel * panel)
    module = experts_of(shape, kind)
    x = normal(tokens, shape.d, dtype=kind)
    weights, ids = random_gates(tokens, module.num_experts, shape.k)
    ids = ids.long()
    up, down = (quantise(matrices.transpose(1, 2), bits) for matrices in (module.gate_up_proj, module.down_proj))
    layout = ops.expert_layout(ids, module.num_experts)
    precisions, tolerance = PRECISIONS[bits]
    whole = partial(experts_forward, module, x, ids, weights)
    ours = contestant(OURS, partial(quantised_ffn, x, up, down, layout, weights))
    contestants = [ours, contestant("ours, bf16", whole)]
    contestants += peers_apart(precisions, inputs_apart(module, x, ids, weights))
    read = sum(part.nbytes for matrices in (up, down) for part in (matrices.values, matrices.scales))
    read = read * len(ids.unique()) // module.num_experts
    work = Work(kind, 2 * tokens * shape.k * 3 * shape.d * shape.ffn_hidden, read)
    run(Race(contestants, tolerance, work))
