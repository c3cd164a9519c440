"""Routers that rank experts by their scores: sigmoids, a bias on the choice, groups of experts that are left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from devices import on_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import DIFFERENTIABLE, DTYPES, GATES, ORDERS, Router, check, random_cotangents, weighted_sum
from torch import Tensor

from moduleformer_ext import ops, reference

SIGMOIDS = ORDERS[2:]


def bias_of(num_experts: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(num_experts, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype) / 4


# tokens, num_experts, k, num_groups, top_groups
SIZES = [(1, 1, 1, 1, 1), (70, 24, 3, 4, 2), (9, 256, 8, 8, 4)]
MORE_SIZES = [(66, 12, 12, 3, 3), (67, 9, 4, 9, 5), (130, 60, 20, 3, 2), (3, 2, 1, 2, 1), (5, 1000, 3, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", SIZES + MORE_SIZES)
def test_values_and_gradients(dtype, order, size, device):
    if on_cuda(device) and (size in MORE_SIZES or (dtype, size[1]) != (torch.bfloat16, 24)) and order != SIGMOIDS[1]:
        pytest.skip("the emulated device is slow")
    tokens, num_experts, k, num_groups, top_groups = size
    groups = {"num_groups": num_groups, "top_groups": top_groups, "scored_per_group": 1 + tokens % 2}
    for options in ({"scale": 2.5, "selection_bias": bias_of(num_experts)}, {}):
        router = Router.random("logits", tokens, num_experts, dtype=dtype, device=device)
        check(router, k, order=order, **options, **groups)


@pytest.mark.parametrize("gate", ["linear", "mlp", "gmm"])
@pytest.mark.parametrize("order", SIGMOIDS)
def test_every_gate_network(gate, order, device):
    router = Router.random(gate, 70, 24, dtype=torch.bfloat16, device=device)
    check(router, 3, order=order, selection_bias=bias_of(24), num_groups=4, top_groups=2, scale=0.5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("field", DIFFERENTIABLE)
@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_gradcheck(order, field, scale):
    router = Router.random("linear", 4, 6, dim=3).require_grad()

    def output(x, weight):
        options = {"selection_bias": bias_of(6), "num_groups": 3, "top_groups": 2, "scale": scale}
        return getattr(ops.route_topk_linear(x, weight, 2, order=order, **options), field)

    assert torch.autograd.gradcheck(output, tuple(router.leaves()))


def deepseek_v3(logits: Tensor, bias: Tensor, k: int, num_groups: int, top_groups: int, scale: float) -> list[Tensor]:
    """Weights and ids as the published model computes them, in the order of choice."""
    scores = logits.sigmoid()
    choice = scores + bias
    groups = choice.view(len(logits), num_groups, -1).topk(2, dim=-1).values.sum(-1)
    mask = torch.zeros_like(groups).scatter_(1, groups.topk(top_groups, dim=-1).indices, 1)
    mask = mask.bool().repeat_interleave(logits.shape[1] // num_groups, dim=1)
    ids = choice.masked_fill(~mask, -torch.inf).topk(k, dim=-1).indices
    weights = scores.gather(1, ids)
    return [weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale, ids]


def test_is_the_rule_of_deepseek_v3(device):
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    bias = bias_of(64, torch.float32)
    leaf, twin = (logits.clone().to(place).requires_grad_() for place in (device, "cpu"))
    options = {"order": "sigmoid_topk_renormalised", "scale": 2.5, "num_groups": 8, "top_groups": 3}
    route = ops.route_topk(leaf, 6, selection_bias=bias.to(device), **options)
    weights, ids = deepseek_v3(twin, bias, 6, 8, 3, 2.5)
    assert torch.equal(route.expert_ids.cpu().long(), ids)
    torch.testing.assert_close(route.gates.cpu(), weights)
    cotangent = torch.randn(50, 6)
    (route.gates * cotangent.to(device)).sum().backward()
    (weights * cotangent).sum().backward()
    torch.testing.assert_close(leaf.grad.cpu(), twin.grad)


@pytest.mark.parametrize("order", SIGMOIDS)
def test_ties_and_saturation(order, device):
    """By logit where nothing else ranks, however near to 1 sigmoids are; by score with a bias, lower index first."""
    logits = torch.tensor([[60.0, 90.0, 70.0, 90.0], [0.0, -0.0, 0.0, 0.0]], device=device)
    assert ops.route_topk(logits, 3, order=order).expert_ids.tolist() == [[1, 3, 2], [0, 1, 2]]
    bias = torch.zeros(4, device=device)
    assert ops.route_topk(logits, 3, order=order, selection_bias=bias).expert_ids.tolist() == [[0, 1, 2]] * 2
    groups = ops.route_topk(logits, 2, order=order, num_groups=4, top_groups=2)
    assert groups.expert_ids.tolist() == [[0, 1]] * 2


def test_which_groups_are_left(device):
    """Two experts that are good together against the best one; the lower group among equals."""
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.6, 0.6, 0.1], [0.5, 0.2, 0.2, 0.5, 0.2, 0.2]], device=device)
    options = {"order": "sigmoid_topk", "num_groups": 2, "top_groups": 1}
    two = ops.route_topk(scores.logit(), 2, **options)
    assert two.expert_ids.tolist() == [[3, 4], [0, 1]]
    assert ops.route_topk(scores.logit(), 2, scored_per_group=1, **options).expert_ids.tolist() == [[0, 1], [0, 1]]
    torch.testing.assert_close(two.gates[0].cpu(), torch.tensor([0.6, 0.6]))
    bias = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf, -torch.inf, 0.0], device=device)
    masked = ops.route_topk(scores.logit(), 2, selection_bias=bias, **options)
    assert masked.expert_ids.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity(bad, device):
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(device)
    clean = logits.clone()
    logits[3, 6] = torch.nan
    logits[5] = bad
    others = [t for t in range(40) if t not in (3, 5)]
    for order, num_groups in itertools.product(SIGMOIDS, (1, 4)):
        options = {"order": order, "num_groups": num_groups, "top_groups": (num_groups + 1) // 2}
        options["selection_bias"] = bias_of(8, torch.float32).to(device)
        route, expected = ops.route_topk(logits, 3, **options), ops.route_topk(clean, 3, **options)
        assert torch.equal(route.gates[others], expected.gates[others])
        assert torch.equal(route.expert_ids[others], expected.expert_ids[others])
        assert (route.expert_ids.sort(-1).values.diff(dim=-1) > 0).all()
        assert ((route.expert_ids >= 0) & (route.expert_ids < 8)).all()
        assert route.expert_ids[3, 0] == 6
        assert route.gates[3].isnan().sum() == (1 if order == "sigmoid_topk" else 3)
        gates_of_infinity = {"sigmoid_topk": [1.0] * 3, "sigmoid_topk_renormalised": [1 / 3] * 3}[order]
        expected_gates = {torch.inf: gates_of_infinity, -torch.inf: [0.0] * 3}.get(bad, [torch.nan] * 3)
        torch.testing.assert_close(route.gates[5].tolist(), expected_gates, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", SIGMOIDS)
def test_tails_keep_their_digits(order, dtype, device):
    if on_cuda(device) and dtype == torch.float64:
        pytest.skip("no float64 there")
    logits = torch.tensor(
        [
            [-80.0, -81.0, -85.0, -1e30],
            [20.0, 30.0, 40.0, 50.0],
            [80.0, -80.0, -1000.0, 1000.0],
            [-43.0, -45.0, -47.0, 0],
        ],
        dtype=dtype,
        device=device,
    ).requires_grad_()
    exact = logits.detach().cpu().double().requires_grad_()
    options = {"order": order, "scale": 3.0}
    route, expected = ops.route_topk(logits, 3, **options), reference.route_topk(exact, 3, **options)
    torch.testing.assert_close(route.gates.cpu().double(), expected.gates, rtol=1e-5, atol=1e-37)
    cotangent = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (route.gates * cotangent.to(logits)).sum().backward()
    (expected.gates * cotangent).sum().backward()
    torch.testing.assert_close(
        logits.grad.cpu().double()[[0, 1, 3]], slopes(exact, order, cotangent), rtol=2e-5, atol=1e-36
    )
    assert logits.grad.isfinite().all()


def slopes(exact: Tensor, order: str, cotangent: Tensor) -> Tensor:
    """The gradient of 3 · gates · cotangent, where autograd's s (1 - s) would have lost its digits."""
    rows = []
    for row in exact.detach()[[0, 1, 3]]:
        ids = row.sort(descending=True, stable=True).indices[:3]
        s, slope, sum_, mean = row[ids].sigmoid(), row[ids].sigmoid() * (-row[ids]).sigmoid(), 1.0, 0.0
        if order == "sigmoid_topk_renormalised":
            sum_ = s.sum() + 1e-20
            mean = (cotangent * s).sum() / sum_
        rows.append(torch.zeros_like(row).scatter(0, ids, 3 * slope / sum_ * (cotangent - mean)))
    return torch.stack(rows)


def outcome(gate: str, tokens: int, dtype: torch.dtype, order: str, device: torch.device | None = None) -> list[Tensor]:
    router = Router.random(gate, tokens, 12, dtype=dtype, device=device).require_grad()
    bias = bias_of(12, torch.float32).to(device)
    route = router(ops, 2, order=order, selection_bias=bias, num_groups=4, top_groups=2, scale=1.5)
    weighted_sum(route, {n: c.to(device) for n, c in random_cotangents(route).items()}).backward()
    return [*route, *(tensor.grad for tensor in router.leaves())]


@pytest.mark.parametrize("order", SIGMOIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_again_and_with_other_threads(order, dtype, set_threads):
    first = None
    for count in (1, 2, 3, 2):
        set_threads(count)
        tensors = outcome("linear", 333, dtype, order)
        first = first or tensors
        assert all(torch.equal(one, other) for one, other in zip(first, tensors, strict=True))


def test_same_bits_every_time(device):
    first, again = (outcome("mlp", 70, torch.bfloat16, SIGMOIDS[1], device) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.usefixtures("new_memory_is_nan")
@pytest.mark.parametrize("order", ORDERS)
def test_every_output_is_written(order):
    for gate, tokens in itertools.product(GATES, (0, 1, 67)):
        for tensor in outcome(gate, tokens, torch.float32, order):
            assert tensor.isfinite().all()
            assert (tensor.abs() < 1e9).all()


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles_to_one_graph(backend):
    def run(logits: Tensor, bias: Tensor) -> Tensor:
        route = ops.route_topk(logits, 2, order=SIGMOIDS[1], selection_bias=bias, num_groups=3, top_groups=2)
        return route.gates[:, 0].sum() + route.prob_sum[0]

    torch.compiler.reset()
    compiled: Callable[..., Tensor] = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (7, 20):
        logits, bias = torch.randn(tokens, 6, requires_grad=True), bias_of(6)
        gradients = [torch.autograd.grad(f(logits, bias), logits)[0] for f in (run, compiled)]
        torch.testing.assert_close(*gradients)


def test_strides_and_types_of_the_bias(device):
    logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(3)).to(device)
    bias = bias_of(6, torch.bfloat16).to(device)
    strided = torch.stack([bias, bias], -1)[:, 0]
    expected = ops.route_topk(logits, 2, selection_bias=bias.float())
    for other in (bias, strided, bias.double()):
        assert torch.equal(ops.route_topk(logits, 2, selection_bias=other).expert_ids, expected.expert_ids)
    free = ops.route_topk(logits, 2).expert_ids
    assert not torch.equal(free, expected.expert_ids)  # the bias has chosen
    leaf = bias.float().requires_grad_()
    assert not ops.route_topk(logits, 2, selection_bias=leaf).gates.requires_grad


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 100),
    size=st.integers(1, 9),
    num_groups=st.integers(1, 12),
    data=st.data(),
    order=st.sampled_from(ORDERS),
    scored_per_group=st.integers(1, 2),
    biased=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_properties(tokens, size, num_groups, data, order, scored_per_group, biased, seed):
    top_groups = data.draw(st.integers(1, num_groups))
    k = data.draw(st.integers(1, top_groups * size))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, size * num_groups, generator=generator, dtype=torch.float64)
    options = {"order": order, "num_groups": num_groups, "top_groups": top_groups, "scored_per_group": scored_per_group}
    if biased:
        options["selection_bias"] = torch.randn(size * num_groups, generator=generator).round(decimals=1)
    route, expected = ops.route_topk(logits, k, **options), reference.route_topk(logits, k, **options)
    assert torch.equal(route.expert_ids, expected.expert_ids)
    ids = route.expert_ids.long()
    assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()  # distinct
    assert all(len(set(row)) <= top_groups for row in (ids // size).tolist())
    assert torch.equal(route.counts, ids.flatten().bincount(minlength=size * num_groups).int())
    torch.testing.assert_close(route.gates, expected.gates, rtol=1e-10, atol=1e-12)
    plain = ops.route_topk(logits, k)  # whose sums are the same, whatever is chosen
    assert torch.equal(route.prob_sum, plain.prob_sum) and torch.equal(route.plogp_sum, plain.plogp_sum)
