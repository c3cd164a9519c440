"""What concerns the CUDA kernels alone; values and gradients are compared in tests/ops."""

import pytest
import torch
from routed import relative_error
from router_cases import DIFFERENTIABLE, Router, check
from torch import Tensor

from moduleformer_ext import ops


@pytest.mark.parametrize("gate", ["linear", "mlp", "gmm"])
def test_whole_tiles_under_any_schedule(gate, device, schedule):
    check(Router.random(gate, 64, 64, dim=128, hidden=64, dtype=torch.bfloat16, device=device), 2)


@pytest.mark.parametrize("gate", ["linear", "mlp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_several_pieces_of_tokens_under_any_schedule(gate, dtype, device, schedule):
    check(Router.random(gate, 600, 40, dim=136, hidden=72, dtype=dtype, device=device), 2)


@pytest.mark.parametrize("gate", ["linear", "mlp", "gmm"])
def test_large_tiles_and_odd_sizes(gate, device):
    """More tokens than small tiles are for (kMostTokensInSmallTiles)."""
    dtype = torch.float32 if gate == "mlp" else torch.bfloat16
    check(Router.random(gate, 8193, 9, dim=75, hidden=35, dtype=dtype, device=device), 2)


@pytest.mark.parametrize("tokens", [100, 600])
def test_same_bits_every_time(tokens, device):
    router = Router.random("mlp", tokens, 16, dim=32, hidden=24, dtype=torch.bfloat16, device=device).require_grad()

    def run() -> list[Tensor]:
        result = router(ops, 2)
        results = [getattr(result, name) for name in DIFFERENTIABLE]
        return results + list(torch.autograd.grad(sum(r.square().sum() for r in results), router.leaves()))

    for first, again in zip(run(), run(), strict=True):
        assert torch.equal(first, again)


def test_float64_is_refused(device):
    with pytest.raises(ValueError, match="route_topk: x must be float32, bfloat16 or float16 for the CUDA kernels"):
        ops.route_topk(torch.zeros(2, 3, dtype=torch.float64, device=device), 1)


def test_too_many_segments(device):
    x, weight = torch.zeros(2, 8, device=device), [torch.zeros(1, 8, device=device)] * 33
    with pytest.raises(ValueError, match=r"route_topk_linear: weight must have at most 32 segments for .* got 33"):
        ops.route_topk_linear(x, weight, 1)


@pytest.mark.parametrize("depth", [256, 1024, 4096])
def test_float32_logits_are_as_accurate_as_sgemm(depth, device):
    torch.manual_seed(0)
    x, weight = torch.randn(32, depth), torch.randn(16, depth)
    exact = x.double() @ weight.double().T
    logits = ops.route_topk_linear(x.to(device), weight.to(device), 2).logits.cpu()
    assert relative_error(logits, exact) <= 2 * relative_error(x @ weight.T, exact)
