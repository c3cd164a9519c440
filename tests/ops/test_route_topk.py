"""Values and gradients of the routers against the float64 reference."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from devices import on_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import (
    DIFFERENTIABLE,
    DTYPES,
    GATES,
    ORDERS,
    SOFTMAX_ORDERS,
    Router,
    assert_close,
    check,
    random_cotangents,
    weighted_sum,
)

from moduleformer_ext import ops, reference

# tokens, num_experts, k, order, num_sampled
SIZES = [
    (1, 1, 1, "softmax_topk", 0),
    (37, 9, 3, "topk_softmax", 0),
    (65, 40, 2, "softmax_topk", 1),
    (37, 40, 3, "sigmoid_topk_renormalised", 0),
]
MORE_SIZES = [
    (tokens, num_experts, k, order, num_sampled)
    for tokens, num_experts, k, num_sampled in [
        (70, 9, 2, 0),
        (130, 37, 3, 1),
        (5, 16, 16, 0),
        (66, 100, 20, 3),
        (3, 1, 1, 0),
        (2, 5, 3, 3),
    ]
    for order in (SOFTMAX_ORDERS if num_sampled else ORDERS)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", SIZES + MORE_SIZES)
def test_values_and_gradients(dtype, gate, size, device):
    if on_cuda(device) and size in MORE_SIZES:
        pytest.skip("the emulated device is slow")
    tokens, num_experts, k, order, num_sampled = size
    dim = 33 if num_experts == 37 else 24
    router = Router.random(gate, tokens, num_experts, dim=dim, dtype=dtype, device=device)
    noise = torch.rand(tokens, num_experts).double() + 0.1 if num_sampled else None
    check(router, k, order=order, noise=noise, num_sampled=num_sampled)


def test_sizes_around_the_tiles_edges(device):
    check(Router.random("mlp", 33, 67, dim=75, hidden=71, dtype=torch.float32, device=device), 5)


def test_many_experts(device):
    check(Router.random("linear", 9, 300, dim=40, dtype=torch.float32, device=device), 8)
    noise = torch.empty(5, 1000).exponential_()
    check(Router.random("logits", 5, 1000, dtype=torch.float32, device=device), 20, noise=noise, num_sampled=3)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("field", DIFFERENTIABLE)
def test_gradcheck(gate, order, field):
    router = Router.random(gate, 4, 5, dim=3, hidden=4).require_grad()

    def output(*leaves):
        return getattr(
            Router(gate, leaves[0], dict(zip(router.parameters, leaves[1:], strict=True)))(ops, 2, order=order), field
        )

    assert torch.autograd.gradcheck(output, tuple(router.leaves()))


@pytest.mark.parametrize("gate", GATES)
def test_no_tokens(gate, device):
    router = Router.random(gate, 0, 6, dtype=torch.float32, device=device).require_grad()
    route = router(ops, 2)
    assert route.gates.shape == route.expert_ids.shape == (0, 2)
    assert route.counts.tolist() == [0] * 6
    assert route.prob_sum.tolist() == [0.0] * 6
    assert route.plogp_sum.item() == route.logsumexp_sq_sum.item() == 0
    weighted_sum(route, random_cotangents(route)).backward()
    for tensor in router.leaves():
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad == 0).all()


@pytest.mark.parametrize("k", [1, 2, 5, 17])
def test_lowest_index_wins_ties(k, device):
    logits = torch.randint(0, 3, (50, 24), generator=torch.Generator().manual_seed(0)).float()
    logits[0] = 0.0
    logits[1] = torch.tensor([0.0, -0.0] * 12)  # equal, whatever their bits
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    route = ops.route_topk(logits.to(device), k)
    assert torch.equal(route.expert_ids.cpu(), expected.int())
    assert route.expert_ids[1].tolist() == list(range(k))


def test_ties_masks_and_nan_in_one_row(device):
    infinity, nan = torch.inf, torch.nan
    rows = torch.tensor(
        [[0.0, -0.0, 0.0, 0.0], [1.0, -infinity, 2.0, 2.0], [0.0, 1.0, nan, nan], [-1.0, -2.0, -1.0, 0.0]]
    ).to(device)
    result = ops.route_topk(rows, 3)
    assert result.expert_ids.tolist() == [[0, 1, 2], [2, 3, 0], [2, 3, 1], [3, 0, 2]]
    assert result.gates[2].isnan().all()
    assert not result.gates[[0, 1, 3]].isnan().any()
    masked = ops.route_topk(rows[1:2], 3)
    assert masked.plogp_sum.isfinite()
    assert masked.prob_sum[1] == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(order, dtype, device):
    logits = torch.tensor(
        [[1000.0, -1000.0, 0.0, 1000.0], [-1000.0] * 4, [0.0, 1e30, -1e30, 5.0]], dtype=dtype, device=device
    )
    logits.requires_grad_()
    exact = logits.detach().cpu().double().requires_grad_()
    route, expected = ops.route_topk(logits, 2, order=order), reference.route_topk(exact, 2, order=order)
    cotangents = random_cotangents(route)
    cotangents["logsumexp_sq_sum"] *= 0  # 1e60 is not a float32
    for name in ("gates", "prob_sum", "plogp_sum"):
        torch.testing.assert_close(getattr(route, name).cpu().double(), getattr(expected, name), rtol=1e-6, atol=1e-7)
    del cotangents["logsumexp_sq_sum"]
    weighted_sum(route, cotangents).backward()
    weighted_sum(expected, cotangents).backward()
    torch.testing.assert_close(logits.grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_masked_experts():
    """A logit of -infinity: probability 0, and 0 log 0 = 0 in the sum and in its gradient."""
    logits = torch.randn(20, 6, dtype=torch.float64)
    kept = logits[:, [0, 2, 3, 5]].clone().requires_grad_()
    logits[:, [1, 4]] = -torch.inf
    logits.requires_grad_()
    route, alone = ops.route_topk(logits, 2), ops.route_topk(kept, 2)
    for name in ("gates", "plogp_sum", "logsumexp_sq_sum"):
        torch.testing.assert_close(getattr(route, name), getattr(alone, name))
    (route.gates.sum() + route.plogp_sum + route.logsumexp_sq_sum).backward()
    (alone.gates.sum() + alone.plogp_sum + alone.logsumexp_sq_sum).backward()
    torch.testing.assert_close(logits.grad[:, [0, 2, 3, 5]], kept.grad)
    assert (logits.grad[:, [1, 4]] == 0).all()


@pytest.mark.parametrize("order", SOFTMAX_ORDERS)
@pytest.mark.parametrize("num_sampled", [0, 1, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_stays_with_its_token(order, num_sampled, bad, device):
    logits = torch.randn(40, 7).to(device)
    logits[3, 2] = torch.nan
    logits[5] = bad
    noise = torch.empty(40, 7).exponential_().to(device) if num_sampled else None
    route = ops.route_topk(logits, 2, order=order, noise=noise, num_sampled=num_sampled)
    if not (order == "topk_softmax" and num_sampled == 2):  # which may draw two experts with finite logits
        assert route.gates[3].isnan().any()
    assert route.gates[5].isnan().all()
    others = [t for t in range(40) if t not in (3, 5)]
    assert route.gates[others].isfinite().all()
    assert ((route.expert_ids >= 0) & (route.expert_ids < 7)).all()
    assert (route.expert_ids[:, 0] != route.expert_ids[:, 1]).all()
    assert route.counts.sum() == 80
    if num_sampled == 0:
        assert route.expert_ids[3, 0] == 2
    assert route.prob_sum.isnan().all()


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(0, 150),
    num_experts=st.integers(1, 70),
    data=st.data(),
    order=st.sampled_from(ORDERS),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    seed=st.integers(0, 2**16),
)
def test_properties(tokens, num_experts, data, order, scale, seed):
    k = data.draw(st.integers(1, num_experts))
    num_sampled = data.draw(st.integers(0, k)) if order in SOFTMAX_ORDERS else 0
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, num_experts, generator=generator) * scale).round(decimals=1)
    noise = torch.empty(tokens, num_experts).exponential_(generator=generator) if num_sampled else None
    route = ops.route_topk(logits, k, order=order, noise=noise, num_sampled=num_sampled)
    ids, best = route.expert_ids.long(), k - num_sampled

    assert ((ids >= 0) & (ids < num_experts)).all()
    assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()  # distinct
    assert torch.equal(route.counts, ids.flatten().bincount(minlength=num_experts).int())
    assert torch.equal(route.logits, logits)
    chosen = logits.gather(1, ids)
    assert torch.equal(chosen[:, :best], logits.topk(best).values)
    assert (route.gates[:, :best].diff(dim=-1) <= 0).all()
    assert route.prob_sum.sum().item() == pytest.approx(tokens, rel=1e-5)
    assert -tokens * math.log(num_experts) * (1 + 1e-5) <= route.plogp_sum <= 0
    if order == "topk_softmax":
        torch.testing.assert_close(route.gates.sum(-1), torch.ones(tokens))
        torch.testing.assert_close(route.gates, chosen.softmax(-1), rtol=1e-5, atol=1e-7)
    elif order == "softmax_topk":
        torch.testing.assert_close(route.gates, logits.softmax(-1).gather(1, ids), rtol=2e-5, atol=1e-7)
    else:
        gates = chosen.double().sigmoid()
        if order == "sigmoid_topk_renormalised":
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        torch.testing.assert_close(route.gates, gates.float(), rtol=1e-5, atol=1e-7)


def test_sampling_follows_the_probabilities():
    """The sampled pair appears as often as drawing without replacement in proportion to p + 1e-6 makes it."""
    tokens, probs = 40_000, torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1], dtype=torch.float64)
    noise = torch.empty(tokens, 5).exponential_(generator=torch.Generator().manual_seed(3))
    route = ops.route_topk(probs.log().float().expand(tokens, 5), 3, noise=noise, num_sampled=2)
    assert (route.expert_ids[:, 0] == 1).all()  # the best one comes first and is not drawn again
    seen = Counter(map(tuple, route.expert_ids[:, 1:].tolist()))
    left = {expert: probs[expert].item() for expert in (0, 2, 3, 4)}
    for first, second in itertools.permutations(left, 2):
        share = left[first] / 0.6 * left[second] / (0.6 - left[first])
        deviation = (share * (1 - share) / tokens) ** 0.5
        assert abs(seen[first, second] / tokens - share) < 5 * deviation + 1e-5


@pytest.mark.parametrize("gate", ["linear", "mlp", "gmm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 90], ids=["few tokens", "tokens"])
def test_segments_equal_one_tensor(gate, dtype, tokens, device):
    whole = Router.random(gate, tokens, 11, dtype=dtype, device=device).require_grad()
    name = "centroids" if gate == "gmm" else "weight"
    pieces = tuple(whole.parameters[name].detach().clone().split([3, 1, 7]))
    split = Router(gate, whole.x.detach().clone(), dict(whole.parameters))
    split.parameters = {n: v if n == name else v.detach().clone() for n, v in whole.parameters.items()}
    split.parameters[name] = pieces
    for tensor in split.leaves():
        tensor.requires_grad_(tensor is not pieces[1] and tensor is not split.x)
    routes = whole(ops, 2), split(ops, 2)
    for field_of_whole, field_of_split in zip(*routes, strict=True):
        assert torch.equal(field_of_whole, field_of_split)
    cotangents = random_cotangents(routes[0])
    for route in routes:
        weighted_sum(route, cotangents).backward()
    expected = whole.parameters[name].grad.split([3, 1, 7])
    assert pieces[1].grad is None
    assert split.x.grad is None
    for piece, gradient in ((pieces[0], expected[0]), (pieces[2], expected[2])):
        torch.testing.assert_close(piece.grad, gradient)
    for parameter in whole.parameters:
        if parameter != name:
            torch.testing.assert_close(split.parameters[parameter].grad, whole.parameters[parameter].grad)


def test_segments_of_other_types_than_x(device):
    whole = Router.random("linear", 20, 11, dim=16, dtype=torch.float32, device=device)
    whole.x = whole.x.half()
    exact = whole.double()
    segments = tuple(whole.parameters["weight"].detach().clone().split([4, 1, 6]))
    result = Router("linear", whole.x, {"weight": segments}).require_grad()(ops, 3)
    expected = exact(reference, 3)
    assert torch.equal(result.expert_ids.cpu(), expected.expert_ids)
    gradients = torch.autograd.grad(result.gates.square().sum(), segments)
    (twin,) = torch.autograd.grad(expected.gates.square().sum(), exact.parameters["weight"])
    assert_close(torch.cat(gradients), twin, 3e-5, "weight")


@pytest.mark.parametrize("gate", ["linear", "mlp", "gmm"])
@pytest.mark.parametrize("tokens", [8, 70], ids=["few tokens", "tokens"])
def test_only_wanted_gradients(gate, tokens):
    """Each input alone gets the gradient that it gets among all."""
    full = Router.random(gate, tokens, 6).require_grad()
    cotangents = random_cotangents(full(ops, 2))
    weighted_sum(full(ops, 2), cotangents).backward()
    for index in range(len(full.leaves())):
        alone = Router.random(gate, tokens, 6)
        alone.leaves()[index].requires_grad_()
        weighted_sum(alone(ops, 2), cotangents).backward()
        torch.testing.assert_close(alone.leaves()[index].grad, full.leaves()[index].grad)


@pytest.mark.parametrize("gate", ["linear", "mlp", "gmm"])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [2, 40], ids=["few tokens", "tokens"])
def test_mixed_types(gate, x_dtype, weight_dtype, tokens, device):
    router = Router.random(gate, tokens, 6, dtype=torch.float32, device=device)
    router.x = router.x.to(x_dtype)
    router.parameters = {name: value.to(weight_dtype) for name, value in router.parameters.items()}
    exact = router.double()
    route, expected = router.require_grad()(ops, 2), exact(reference, 2)
    assert torch.equal(route.expert_ids.cpu(), expected.expert_ids)
    assert_close(route.gates, expected.gates, 1e-5, "gates")
    cotangents = random_cotangents(route)
    weighted_sum(route, cotangents).backward()
    weighted_sum(expected, cotangents).backward()
    for tensor, twin in zip(router.leaves(), exact.leaves(), strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert_close(tensor.grad, twin.grad, 1e-2 if torch.bfloat16 in (x_dtype, weight_dtype) else 1e-3, "gradient")


def test_non_contiguous_inputs(device):
    router = Router.random("mlp", 30, 6, dtype=torch.float32, device=device)
    strided = Router(
        "mlp", router.x.t().contiguous().t(), {n: torch.stack([v, v], -1)[..., 0] for n, v in router.parameters.items()}
    )
    for one, other in zip(router(ops, 2), strided(ops, 2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_again_and_with_other_threads(gate, dtype, set_threads):
    first = None
    for count in (1, 2, 3, 2):
        set_threads(count)
        router = Router.random(gate, 333, 10, dtype=dtype).require_grad()
        route = router(ops, 2)
        weighted_sum(route, random_cotangents(route)).backward()
        tensors = [*route, *(tensor.grad for tensor in router.leaves())]
        if first is None:
            first = tensors
        assert all(torch.equal(one, other) for one, other in zip(first, tensors, strict=True))


@pytest.mark.usefixtures("new_memory_is_nan")
def test_every_output_is_written():
    for gate, tokens in itertools.product(GATES, (0, 1, 67)):
        router = Router.random(gate, tokens, 7, dtype=torch.float32).require_grad()
        route = router(ops, 3)
        weighted_sum(route, random_cotangents(route)).backward()
        for tensor in [*route, *(tensor.grad for tensor in router.leaves())]:
            assert tensor.isfinite().all()
            assert (tensor.abs() < 1e9).all()
