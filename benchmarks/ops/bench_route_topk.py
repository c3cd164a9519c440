"""Router and layout: gate network, softmax, top-k, the sums of the losses, slots sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moduleformer_ext import ops
from moduleformer_ext.types import RouteTopK

from ..cells import (
    NOT_SLOWER,
    OURS,
    REFERENCE,
    Cell,
    Contestant,
    Goal,
    Outputs,
    Race,
    Tolerance,
    Work,
    dtype_name,
)
from ..inputs import layer_shape, normal
from ..peers import jetmoe
from ..peers.routers import Routing, mlp_logits, mutual_information_loss, route, sorted_layout
from ..pytest_cells import run_cell

SECTION = "router"
JETMOE = "JetMoE (no losses)"
# In bf16 the sequence rounds its logits: tokens near a tie choose other experts.
TOLERANCES = {torch.float32: Tolerance(1e-3, quantile=0.99), torch.bfloat16: Tolerance(0.1, quantile=0.9)}


def _outputs(routing: RouteTopK | Routing, counts: Tensor) -> Outputs:
    return {"gates": routing.gates, "prob_sum": routing.prob_sum, "counts": counts.float()}


def race(tokens: int, dtype: torch.dtype, *, quick: bool, gate: str, backward: bool) -> Race:
    shape = layer_shape(quick)
    experts, k = shape.ffn_experts, shape.k
    width = shape.gating_size if gate == "mlp" else shape.d
    x = normal(tokens, shape.d, dtype=dtype)
    weight = normal(experts, width, dtype=dtype, std=3 * width**-0.5, seed=1)
    hidden_weight = normal(shape.gating_size, shape.d, dtype=dtype, std=shape.d**-0.5, seed=2)
    hidden_bias = normal(shape.gating_size, dtype=dtype, std=0.1, seed=3)
    leaves = {"x": x, "weight": weight}
    if gate == "mlp":
        leaves |= {"hidden_weight": hidden_weight, "hidden_bias": hidden_bias}
    d_gates = normal(tokens, k, seed=4)
    if backward:
        for leaf in leaves.values():
            leaf.requires_grad_()

    def our_route() -> RouteTopK:
        if gate == "mlp":
            return ops.route_topk_mlp(x, hidden_weight, hidden_bias, weight, k)
        return ops.route_topk_linear(x, weight, k)

    def plain_route() -> Routing:
        logits = mlp_logits(x, hidden_weight, hidden_bias, weight) if gate == "mlp" else F.linear(x, weight)
        return route(logits, k)

    def forward_ours() -> Outputs:
        with torch.no_grad():
            routing = our_route()
            return _outputs(routing, ops.expert_layout(routing.expert_ids, experts).counts)

    def forward_plain() -> Outputs:
        with torch.no_grad():
            routing = plain_route()
            return _outputs(routing, sorted_layout(routing.expert_ids, experts).counts)

    def clear() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def gradients() -> Outputs:
        return {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def train_ours(d_gates: Tensor) -> Outputs:
        routing = our_route()
        layout = ops.expert_layout(routing.expert_ids, experts)
        loss = ops.losses.mutual_information_loss(routing)
        torch.autograd.backward([routing.gates, loss], [d_gates, torch.ones_like(loss)])
        return {**_outputs(routing, layout.counts), **gradients()}

    def train_plain(d_gates: Tensor) -> Outputs:
        routing = plain_route()
        layout = sorted_layout(routing.expert_ids, experts)
        loss = mutual_information_loss(routing, tokens)
        torch.autograd.backward([routing.gates, loss], [d_gates, torch.ones_like(loss)])
        return {**_outputs(routing, layout.counts), **gradients()}

    if backward:
        # In bf16 some tokens tie and their gates' gradients go to other experts: there, check the loss's gradient only.
        checked = d_gates if dtype == torch.float32 else torch.zeros_like(d_gates)
        contestants = [
            Contestant(name, partial(train, d_gates), clear, check=partial(train, checked))
            for name, train in ((OURS, train_ours), (REFERENCE, train_plain))
        ]
    else:
        contestants = [Contestant(OURS, forward_ours), Contestant(REFERENCE, forward_plain)]
        if gate == "linear" and jetmoe.AVAILABLE:
            jetmoe_gate = jetmoe.gate(weight, k)

            def forward_jetmoe() -> Outputs:
                with torch.no_grad():
                    return {"gates": jetmoe_gate(x)[2]}

            contestants.append(Contestant(JETMOE, forward_jetmoe, comparable=False))
    matrices = [weight] if gate == "linear" else [hidden_weight, weight]
    flops = sum(2 * tokens * matrix.numel() for matrix in matrices) * (3 if backward else 1)
    read = x.nbytes + sum(matrix.nbytes for matrix in matrices)
    return Race(tuple(contestants), Work(dtype, flops, read))


def cells(quick: bool = False) -> Iterator[Cell]:
    lengths = (32,) if quick else (512, 2048, 4096)
    for threads in (2, 1):
        for tokens in lengths if threads == 2 else lengths[1:2]:
            for gate in ("mlp", "linear"):
                for dtype in (torch.float32, torch.bfloat16):
                    for backward in (False, True):
                        direction = "forward+backward" if backward else "forward"
                        title = f"{gate} gate, {dtype_name(dtype)} {direction}, T {tokens}"
                        build = partial(race, tokens, dtype, quick=quick, gate=gate, backward=backward)
                        tags = {"dtype": dtype_name(dtype), "tokens": tokens, "direction": direction, "kind": gate}
                        goals: tuple[Goal, ...] = (NOT_SLOWER, Goal("memory", 1.0, REFERENCE))
                        if not backward and gate == "mlp" and dtype == torch.float32:
                            goals = (Goal("roofline", 1.25), *goals)
                        elif not backward:
                            goals = (Goal("speedup", 2.0, REFERENCE), *goals)
                        yield Cell(SECTION, title, threads, build, TOLERANCES[dtype], goals, tags)


@pytest.mark.parametrize("cell", list(cells()), ids=lambda cell: cell.key)
def test_route_topk(cell: Cell, benchmark: object) -> None:
    run_cell(cell, benchmark)
