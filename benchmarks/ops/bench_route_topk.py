"""Router and layout: gate network, softmax, top-k, the sums of the losses, slots sorted by expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext import ops

from ..inputs import LayerShape, normal
from ..machine import DTYPES, Work
from ..peers import jetmoe
from ..peers.experts import mlp_logits, mutual_information_loss, route, sorted_layout
from ..race import LIMIT, MEMORY, OURS, REFERENCE, Backward, Contestant, Outputs, Race, Run, Tolerance, contestant

pytestmark = pytest.mark.benchmark(group="Router and layout")
# In bf16 the sequence rounds its logits: tokens near a tie choose other experts.
TOLERANCES = {"fp32": Tolerance(1e-3, quantile=0.99), "bf16": Tolerance(0.1, quantile=0.9)}
CASES = (["mlp gate", "linear gate"], DTYPES, ["forward", "forward+backward"])


@pytest.mark.cases(
    "threads gate dtype direction tokens",
    cpu=[*product([2], *CASES, [512, 2048, 4096]), *product([1], *CASES, [2048])],
    cuda=[*product([0], *CASES, [4096, 16384]), *product([0], *CASES[:2], ["forward"], [1])],
)
def test_route_topk(
    run: Run, shape: LayerShape, threads: int, gate: str, dtype: str, direction: str, tokens: int
) -> None:
    experts, k, kind, backward = shape.ffn_experts, shape.k, DTYPES[dtype], direction != "forward"
    x = normal(tokens, shape.d, dtype=kind)
    d_gates = normal(tokens, k, seed=4)
    if gate == "mlp gate":
        weights = {
            "hidden_weight": normal(shape.gating_size, shape.d, dtype=kind, std=shape.d**-0.5, seed=2),
            "hidden_bias": normal(shape.gating_size, dtype=kind, std=0.1, seed=3),
            "weight": normal(experts, shape.gating_size, dtype=kind, std=3 * shape.gating_size**-0.5, seed=1),
        }
        our_route, plain_logits = ops.route_topk_mlp, mlp_logits
    else:
        weights = {"weight": normal(experts, shape.d, dtype=kind, std=3 * shape.d**-0.5, seed=1)}
        our_route, plain_logits = ops.route_topk_linear, F.linear
    inputs = x, *weights.values()

    def ours() -> tuple[Any, Any, Callable[[], Tensor]]:
        routing = our_route(*inputs, k)
        layout = ops.expert_layout(routing.expert_ids, experts)
        return routing, layout, lambda: ops.losses.mutual_information_loss(routing)

    def plain() -> tuple[Any, Any, Callable[[], Tensor]]:
        routing = route(plain_logits(*inputs), k)
        layout = sorted_layout(routing.expert_ids, experts)
        return routing, layout, lambda: mutual_information_loss(routing, tokens)

    train = Backward({"x": x, **weights}, d_gates) if backward else None

    def outputs(way: Callable[[], tuple[Any, Any, Callable[[], Tensor]]], d_gates: Tensor) -> Outputs:
        with torch.set_grad_enabled(backward):
            routing, layout, loss = way()
            found = {"gates": routing.gates, "prob_sum": routing.prob_sum, "counts": layout.counts.float()}
            if train is None:
                return found
            value = loss()
            torch.autograd.backward([routing.gates, value], [d_gates, torch.ones_like(value)])
            return {**found, **train.gradients()}

    # In bf16 some tokens tie and their gates' gradients go to other experts: there, check the loss's gradient only.
    checked = d_gates if dtype == "fp32" else torch.zeros_like(d_gates)
    contestants = [
        Contestant(
            name,
            partial(outputs, way, d_gates),
            prepare=train.prepare if train else None,
            check=partial(outputs, way, checked) if train else None,
        )
        for name, way in ((OURS, ours), (REFERENCE, plain))
    ]
    if gate == "linear gate" and not backward and jetmoe.AVAILABLE:
        jetmoe_gate = jetmoe.gate(weights["weight"], k)
        contestants.append(contestant("JetMoE (no losses)", lambda: jetmoe_gate(x)[2], comparable=False))

    matrices = [weight for weight in weights.values() if weight.dim() == 2]
    flops = sum(2 * tokens * matrix.numel() for matrix in matrices) * (3 if backward else 1)
    goals = {MEMORY + REFERENCE: 1.0} if threads else {}
    if threads and not backward:
        goals |= {LIMIT: 1.25} if (gate, dtype) == ("mlp gate", "fp32") else {REFERENCE: 2.0}
    work = Work(kind, flops, x.nbytes + sum(matrix.nbytes for matrix in matrices))
    run(Race(contestants, TOLERANCES[dtype], work, goals))
