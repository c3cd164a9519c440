"""Against the plain-PyTorch twins in float64, through autograd."""

import pytest
import torch
from routed import relative_error
from torch import Tensor

from moduleformer_ext import ops, reference
from moduleformer_ext.types import RouteTopK

GATES = ("logits", "linear", "mlp", "gmm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESULTS = ("gates", "prob_sum", "plogp_sum", "logsumexp_sq_sum", "logits")
# Of float32 results; a gradient is rounded to its input's type, and with bfloat16 on the way to x and V.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 1.5e-3}


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def inputs_of(gate: str, tokens: int, experts: int, dim: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    if gate == "logits":
        return [normal(tokens, experts, dtype=dtype)]
    x = normal(tokens, dim, dtype=dtype)
    if gate == "linear":
        return [x, normal(experts, dim, dtype=dtype, scale=dim**-0.5)]
    hidden_weight = normal(hidden, dim, dtype=dtype, scale=dim**-0.5)
    if gate == "mlp":
        weight = normal(experts, hidden, dtype=dtype, scale=2 * hidden**-0.5)
        return [x, hidden_weight, normal(hidden, dtype=dtype, scale=0.1), weight]
    return [x, hidden_weight, normal(experts, hidden, dtype=dtype), torch.tensor(0.7, dtype=dtype)]


def route(module, gate: str, inputs: list[Tensor], k: int, **options) -> RouteTopK:
    return getattr(module, "route_topk" if gate == "logits" else f"route_topk_{gate}")(*inputs, k, **options)


def assert_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(expected.abs().max().item(), 1e-6) if expected.numel() else 1.0
    error = (actual.detach().cpu().double() - expected.detach()).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * scale, f"{what}: {error} of {scale}"


def check(gate, inputs, k, device, order="softmax_topk", num_sampled=0):
    """Results and, for a random weighting of them, the gradients of all inputs."""
    tokens = inputs[0].shape[0]
    experts = inputs[0].shape[1] if gate == "logits" else inputs[-2 if gate == "gmm" else -1].shape[0]
    noise = torch.empty(tokens, experts).exponential_() if num_sampled else None
    leaves = [t.detach().to(device).requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    on_device = noise.to(device) if noise is not None else None
    actual = route(ops, gate, leaves, k, order=order, noise=on_device, num_sampled=num_sampled)
    double = noise.double() if noise is not None else None
    expected = route(reference, gate, exact, k, order=order, noise=double, num_sampled=num_sampled)
    assert torch.equal(actual.expert_ids.cpu(), expected.expert_ids)
    assert torch.equal(actual.counts.cpu(), expected.counts)
    for name in RESULTS:
        assert getattr(actual, name).dtype == torch.float32
        assert_close(name, getattr(actual, name), getattr(expected, name), 3e-6)

    weights = {name: torch.randn_like(getattr(expected, name)) for name in RESULTS}
    loss = sum((getattr(actual, name) * weights[name].to(device, torch.float32)).sum() for name in RESULTS)
    exact_loss = sum((getattr(expected, name) * weights[name]).sum() for name in RESULTS)
    gradients = torch.autograd.grad(loss, leaves)
    for i, (gradient, wanted) in enumerate(zip(gradients, torch.autograd.grad(exact_loss, exact), strict=True)):
        assert gradient.dtype == inputs[i].dtype
        assert_close(f"gradient of input {i}", gradient, wanted, 10 * TOLERANCE[inputs[i].dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "order", "num_sampled"),
    [(1, 1, 1, "softmax_topk", 0), (37, 9, 3, "topk_softmax", 0), (65, 40, 2, "softmax_topk", 1)],
)
def test_values_and_gradients(gate, dtype, tokens, experts, k, order, num_sampled, device):
    torch.manual_seed(tokens)
    check(gate, inputs_of(gate, tokens, experts, 24, 20, dtype), k, device, order, num_sampled)


@pytest.mark.parametrize("gate", ["linear", "mlp", "gmm"])
def test_whole_tiles_under_any_schedule(gate, device, schedule):
    torch.manual_seed(5)
    check(gate, inputs_of(gate, 64, 64, 128, 64, torch.bfloat16), 2, device)


def test_odd_sizes(device):
    torch.manual_seed(6)
    check("mlp", inputs_of("mlp", 33, 67, 75, 71, torch.float32), 5, device)


def test_more_experts_than_a_block_has_threads(device):
    torch.manual_seed(7)
    check("linear", inputs_of("linear", 9, 300, 40, 0, torch.float32), 8, device)
    check("logits", inputs_of("logits", 5, 1000, 0, 0, torch.float32), 20, device, num_sampled=3)


@pytest.mark.parametrize("gate", GATES)
def test_no_tokens(gate, device):
    inputs = [t.to(device).requires_grad_() for t in inputs_of(gate, 0, 4, 8, 8, torch.float32)]
    result = route(ops, gate, inputs, 2)
    assert result.counts.tolist() == [0] * 4
    assert result.prob_sum.tolist() == [0.0] * 4
    for gradient in torch.autograd.grad(result.gates.sum() + result.plogp_sum, inputs, allow_unused=True):
        assert gradient is None or not gradient.any()


def test_segments_of_other_types_than_x(device):
    torch.manual_seed(8)
    x, weight = normal(20, 16, dtype=torch.float16), normal(11, 16, dtype=torch.float32)
    leaves = [t.to(device).requires_grad_() for t in (weight[:4].clone(), weight[4:5].clone(), weight[5:].clone())]
    whole = weight.double().requires_grad_()
    result = ops.route_topk_linear(x.to(device), leaves, 3)
    expected = reference.route_topk_linear(x.double(), whole, 3)
    assert torch.equal(result.expert_ids.cpu(), expected.expert_ids)
    gradients = torch.autograd.grad(result.gates.square().sum(), leaves)
    assert_close("weight", torch.cat(gradients), torch.autograd.grad(expected.gates.square().sum(), whole)[0], 3e-5)


def test_ties_masks_and_nan(device):
    infinity, nan = torch.inf, torch.nan
    rows = torch.tensor(
        [[0.0, -0.0, 0.0, 0.0], [1.0, -infinity, 2.0, 2.0], [0.0, 1.0, nan, nan], [-1.0, -2.0, -1.0, 0.0]]
    )
    result = ops.route_topk(rows.to(device), 3)
    assert result.expert_ids.tolist() == [[0, 1, 2], [2, 3, 0], [2, 3, 1], [3, 0, 2]]
    assert result.gates[2].isnan().all()
    assert not result.gates[[0, 1, 3]].isnan().any()
    masked = ops.route_topk(rows[1:2].to(device), 3)
    assert masked.plogp_sum.isfinite()
    assert masked.prob_sum[1] == 0


def test_same_bits_every_time(device):
    torch.manual_seed(9)
    inputs = [t.to(device).requires_grad_() for t in inputs_of("mlp", 100, 16, 32, 24, torch.bfloat16)]

    def run() -> list[Tensor]:
        result = route(ops, "mlp", inputs, 2)
        results = [getattr(result, name) for name in RESULTS]
        return results + list(torch.autograd.grad(sum(r.square().sum() for r in results), inputs))

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
