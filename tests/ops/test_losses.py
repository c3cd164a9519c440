"""The routing losses against the paper's formulas, written out token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch

from moduleformer_ext import ops, reference
from moduleformer_ext.ops.losses import concentration_loss, mutual_information_loss, new_expert_loss, switch_loss

LOSSES = (mutual_information_loss, concentration_loss, switch_loss)


def probabilities(logits: torch.Tensor) -> list[list[float]]:
    rows = []
    for row in logits.tolist():
        shift = max(row)
        weights = [math.exp(value - shift) for value in row]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


def entropy(distribution: list[float]) -> float:
    return -sum(p * math.log(p + 1e-8) for p in distribution)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


def mean_distribution(logits: torch.Tensor) -> list[float]:
    rows = probabilities(logits)
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def test_mutual_information(logits):
    """Equation 7: H(e | x) - H(e)."""
    conditional = sum(-sum(p * math.log(p) for p in row) for row in probabilities(logits)) / len(logits)
    expected = conditional - entropy(mean_distribution(logits))
    assert mutual_information_loss(ops.route_topk(logits, 2)).item() == pytest.approx(expected, rel=1e-12)


def test_concentration(logits):
    """Equation 8 minimises the marginal entropy."""
    expected = entropy(mean_distribution(logits))
    assert concentration_loss(ops.route_topk(logits, 2)).item() == pytest.approx(expected, rel=1e-12)


def test_switch(logits):
    route = ops.route_topk(logits, 2)
    share = [route.expert_ids.flatten().tolist().count(expert) / 18 for expert in range(6)]
    balance = 6 * sum(p * f for p, f in zip(mean_distribution(logits), share, strict=True))
    z = sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits.tolist()) / 9
    assert switch_loss(route).item() == pytest.approx(balance + 0.1 * z, rel=1e-7)  # the share is float32


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_reference(loss, dtype):
    logits = torch.randn(200, 12, dtype=dtype, requires_grad=True)
    twin = logits.detach().double().requires_grad_()
    value = loss(ops.route_topk(logits, 3))
    expected = getattr(reference.losses, loss.__name__)(reference.route_topk(twin, 3))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    value.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.double(), twin.grad, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss, logits):
    assert torch.autograd.gradcheck(lambda values: loss(ops.route_topk(values, 2)), logits.requires_grad_())


@pytest.mark.parametrize("loss", [loss.__name__ for loss in LOSSES] + ["new_expert_loss"])
@pytest.mark.parametrize("side", [ops, reference], ids=["ops", "reference"])
def test_no_tokens(side, loss):
    logits = torch.zeros(0, 6, requires_grad=True)
    options = {"num_new": 2} if loss == "new_expert_loss" else {}
    value = getattr(side.losses, loss)(side.route_topk(logits, 2), **options)
    assert value.item() == 0
    value.backward()
    assert logits.grad.shape == (0, 6)


def test_saturated_logits_stay_finite():
    """Above 88 a sum of exponentials overflows; the losses must not."""
    logits = torch.tensor([[500.0, -500.0, 90.0], [-300.0, 400.0, 0.0]], requires_grad=True)
    route = ops.route_topk(logits, 1)
    total = sum(loss(route) for loss in LOSSES)
    total.backward()
    assert total.isfinite()
    assert logits.grad.isfinite().all()
    assert switch_loss(route).item() == pytest.approx(3 * 0.5 + 0.1 * (500**2 + 400**2) / 2)


def test_extremes_of_mutual_information():
    """Certain and balanced: -log E. Indifferent: 0. Certain and always the same: 0."""
    certain = torch.eye(4, dtype=torch.float64) * 1000
    assert mutual_information_loss(ops.route_topk(certain, 1)).item() == pytest.approx(-math.log(4), abs=1e-6)
    assert mutual_information_loss(ops.route_topk(certain * 0, 1)).item() == pytest.approx(0, abs=1e-6)
    assert mutual_information_loss(ops.route_topk(certain[:1].expand(4, 4), 1)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("num_new", [0, 2, 6])
def test_new_expert_loss(logits, num_new):
    """Equation 10, as a share: the mean over tokens of the new experts' probability."""
    expected = sum(sum(row[6 - num_new :]) for row in probabilities(logits)) / len(logits)
    value = new_expert_loss(ops.route_topk(logits, 2), num_new)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    twin = reference.losses.new_expert_loss(reference.route_topk(logits, 2), num_new)
    assert twin.item() == pytest.approx(expected, rel=1e-12)


def test_new_expert_loss_refuses_more_experts_than_there_are(logits):
    with pytest.raises(ValueError, match=r"new_expert_loss: num_new must be in \[0, 6\], got 7"):
        new_expert_loss(ops.route_topk(logits, 2), 7)
