from __future__ import annotations

import itertools

import pytest
import torch
from routed import as_leaves, assert_as_accurate, gradients, randn, relative_error, rows_shape
from tf32_settings import SETTINGS, tf32

from moduleformer_ext import reference
from moduleformer_ext.ops import expert_ffn, grouped_gemm
from moduleformer_ext.reference.grouped_gemm import ACTIVATIONS, GATED
from moduleformer_ext.types import ExpertLayout

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ORDERS = ("token", "slot", "expert")


def layout_of(ids: list[list[int]], experts: int) -> ExpertLayout:
    return reference.expert_layout(torch.tensor(ids, dtype=torch.int32).reshape(len(ids), -1), experts)


def random_layout(tokens: int, experts: int, choices: int) -> ExpertLayout:
    generator = torch.Generator().manual_seed(0)
    return reference.expert_layout(torch.rand(tokens, experts, generator=generator).argsort(1)[:, :choices], experts)


def on(layout: ExpertLayout, device: torch.device) -> ExpertLayout:
    return ExpertLayout(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in layout))


def compare(op, layout, values, device, **options):
    """An op's output and gradients against its twin in the same dtype and in float64."""
    plain = getattr(reference, op.__name__)
    results = []
    for function, dtype in ((op, None), (plain, None), (plain, torch.float64)):
        where = device if function is op else torch.device("cpu")
        inputs = as_leaves(*(None if v is None else v.to(where) for v in values), dtype=dtype)
        *operands, gates = inputs
        out = function(*operands, on(layout, where), gates=gates, **options)
        if not results:
            grad = randn(*out.shape, dtype=out.dtype)
        results.append([t.cpu() for t in (out, *gradients(out, inputs, grad.to(where)))])
    # A gated activation multiplies two saved, that is rounded, halves.
    roundings = 2 if options.get("activation") in GATED else 1
    for i, (ours, same, exact) in enumerate(zip(*results, strict=True)):
        assert_as_accurate(f"result {i}", ours, same, exact, values[0].dtype, roundings)
    return results[0]


def grouped_values(layout, x_order, n, m, dtype, gated=False):
    tokens, choices = layout.num_slots // layout.num_choices, layout.num_choices
    experts = layout.offsets.numel() - 1
    return [
        randn(*rows_shape(x_order, layout, n), dtype=dtype),
        randn(experts, n, m, dtype=dtype, scale=n**-0.5),
        torch.rand(tokens, choices) if gated else None,
    ]


def ffn_values(layout, d, f, dtype, activation):
    tokens, experts = layout.num_slots // layout.num_choices, layout.offsets.numel() - 1
    return [
        randn(tokens, d, dtype=dtype),
        randn(experts, d, 2 * f if activation in GATED else f, dtype=dtype, scale=d**-0.5),
        randn(experts, f, d, dtype=dtype, scale=f**-0.5),
        torch.rand(tokens, layout.num_choices),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("x_order", "out_order"), list(itertools.product(ORDERS, ORDERS)))
def test_orders(x_order, out_order, dtype, device):
    torch.manual_seed(0)
    for tokens, experts, choices, n, m in ((37, 5, 2, 24, 40), (11, 4, 3, 17, 33), (90, 1, 1, 40, 136)):
        layout = random_layout(tokens, experts, choices)
        for gated in {False, out_order == "token"}:
            values = grouped_values(layout, x_order, n, m, dtype, gated)
            compare(grouped_gemm, layout, values, device, x_order=x_order, out_order=out_order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, device):
    torch.manual_seed(1)
    for tokens, n, m in ((29, 24, 2 * 40), (60, 17, 2 * 21), (90, 32, 2 * 72)):
        layout = random_layout(tokens, 3, 2)
        for out_order, gated in (("expert", False), ("token", True)):
            values = grouped_values(layout, "token", n, m, dtype, gated)
            compare(grouped_gemm, layout, values, device, out_order=out_order, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_expert_ffn(activation, dtype, device):
    torch.manual_seed(2)
    for tokens, experts, choices, d, f in ((33, 5, 2, 24, 40), (9, 4, 4, 17, 21), (300, 3, 1, 72, 136)):
        layout = random_layout(tokens, experts, choices)
        compare(expert_ffn, layout, ffn_values(layout, d, f, dtype, activation), device, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 65, 128, 129, 300])
def test_rows_of_an_expert_around_the_tiles_edges(rows, dtype, device):
    torch.manual_seed(3)
    layout = layout_of([[1]] * rows + [[2]], 3)
    compare(grouped_gemm, layout, grouped_values(layout, "token", 72, 136, dtype), device, out_order="slot")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (8, 8), (31, 127), (33, 129), (128, 256), (520, 24), (264, 518)])
def test_features_around_the_tiles_edges(n, m, dtype, device):
    torch.manual_seed(4)
    for tokens in (3, 40, 150):
        layout = random_layout(tokens, 2, 2)
        compare(grouped_gemm, layout, grouped_values(layout, "token", n, m, dtype, True), device, out_order="token")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_without_tokens_get_zero_gradients(dtype, device):
    torch.manual_seed(5)
    layout = layout_of([[34]] * 70, 40)
    _, _, grad_weight = compare(grouped_gemm, layout, grouped_values(layout, "token", 40, 72, dtype), device)
    assert (grad_weight[:34] == 0).all()
    assert (grad_weight[35:] == 0).all()
    assert (grad_weight[34] != 0).any()


@pytest.mark.parametrize("out_order", ORDERS)
def test_no_tokens(out_order, device):
    layout = on(random_layout(0, 3, 2), device)
    x = torch.zeros(0, 8, device=device, requires_grad=True)
    weight = torch.randn(3, 8, 6).to(device).requires_grad_()
    out = grouped_gemm(x, weight, layout, out_order=out_order, activation="silu")
    assert out.shape == rows_shape(out_order, layout, 6)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def run_everything(device):
    generator = torch.Generator().manual_seed(6)

    def rand(*shape):
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_()

    layout = on(layout_of([[0, 1 + t % 3] for t in range(150)], 5), device)
    x, up, down, weight = rand(150, 72), rand(5, 72, 144), rand(5, 72, 72), rand(5, 72, 72)
    gates = torch.rand(150, 2, generator=generator).to(device).requires_grad_()
    y = expert_ffn(x, up, down, layout, gates, activation="swiglu")
    z = grouped_gemm(x, weight, layout, out_order="token", gates=gates)
    (y.float().sum() + z.float().square().sum()).backward()
    return [t.detach().cpu() for t in (y, z, x.grad, up.grad, down.grad, weight.grad, gates.grad)]


def test_same_bits_under_every_schedule(device, schedule):
    for ours, first in zip(run_everything(device), run_everything(device), strict=True):
        assert torch.equal(ours, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_segments_equal_one_tensor(dtype, device):
    torch.manual_seed(7)
    layout = on(random_layout(40, 6, 2), device)
    x, weight = randn(40, 16, dtype=dtype).to(device), randn(6, 16, 24, dtype=dtype).to(device)
    whole = as_leaves(x, weight)
    parts = as_leaves(x, weight[:1], weight[1:1], weight[1:4], weight[4:])
    parts[3].requires_grad_(False)
    out = grouped_gemm(whole[0], whole[1], layout, activation="gelu")
    split = grouped_gemm(parts[0], tuple(parts[1:]), layout, activation="gelu")
    assert torch.equal(out, split)
    grad = torch.randn_like(out)
    out.backward(grad)
    split.backward(grad)
    assert parts[3].grad is None
    assert torch.equal(whole[0].grad, parts[0].grad)
    assert torch.equal(whole[1].grad[:1], parts[1].grad)
    assert torch.equal(whole[1].grad[4:], parts[4].grad)


def test_more_segments_than_a_launch_takes(device):
    layout = on(random_layout(80, 66, 1), device)
    apart = torch.randn(66, 2, 8, 8).to(device)  # every other matrix: no two are neighbours
    with pytest.raises(ValueError, match=r"grouped_gemm: weight must lie in runs of matrices .* at most 64 .* got 65"):
        grouped_gemm(torch.randn(80, 8).to(device), [a[:1] for a in apart], layout)


def test_rows_need_neither_contiguity_nor_alignment(device):
    torch.manual_seed(8)
    layout = on(random_layout(10, 3, 2), device)
    weight = torch.randn(3, 16, 8).to(device)
    slots = torch.randn(2, 10, 16).to(device).transpose(0, 1)
    wide = torch.randn(10, 40).to(device)
    for x, order in ((slots, "slot"), (wide[:, 4:20], "token"), (wide[:, 3:19], "token")):
        leaf, same = x.detach().requires_grad_(), x.contiguous().detach().requires_grad_()
        out = grouped_gemm(leaf, weight, layout, x_order=order, out_order="token")
        expected = grouped_gemm(same, weight, layout, x_order=order, out_order="token")
        torch.testing.assert_close(out, expected)
        out.sum().backward()  # an expanded gradient
        expected.backward(torch.ones_like(expected))
        torch.testing.assert_close(leaf.grad, same.grad)


def test_a_row_that_is_not_finite_stays_alone(device):
    layout = layout_of([[t % 3] for t in range(31)], 3)
    x, weight = randn(31, 9, dtype=torch.bfloat16), randn(3, 9, 21, dtype=torch.bfloat16)
    x[4] = torch.inf
    weight[2, 0, 0] = torch.nan
    out = grouped_gemm(x.to(device), weight.to(device), on(layout, device), out_order="slot").reshape(31, 21).cpu()
    clean = torch.ones(31, 21, dtype=torch.bool)
    clean[4], clean[2::3, 0] = False, False
    assert out[clean].isfinite().all()
    assert not out[~clean].isfinite().any()


@pytest.mark.parametrize("setting", SETTINGS)
def test_tf32_only_on_request(device, setting):
    torch.manual_seed(9)
    layout = random_layout(50, 3, 2)
    x, weight, _ = grouped_values(layout, "token", 256, 40, torch.float32)
    exact = reference.grouped_gemm(x.double(), weight.double(), layout)

    def error():
        out = grouped_gemm(x.to(device), weight.to(device), on(layout, device)).cpu()
        return (out - exact).abs().max().item() / exact.abs().max().item()

    assert error() < 1e-6
    with tf32(setting):
        assert 1e-5 < error() < 1e-3
    assert error() < 1e-6


def test_float64_raises(device):
    layout = on(random_layout(4, 3, 2), device)
    x, weight = torch.randn(4, 8).double().to(device), torch.randn(3, 8, 6).double().to(device)
    with pytest.raises(ValueError, match="grouped_gemm: x must be float32, bfloat16 or float16 for the CUDA kernels"):
        grouped_gemm(x, weight, layout)
    gates = torch.rand(4, 2).double().to(device)
    with pytest.raises(ValueError, match="expert_ffn: x must be float32, bfloat16 or float16 for the CUDA kernels"):
        expert_ffn(x, weight, weight.transpose(1, 2), layout, gates)


@pytest.mark.parametrize("depth", [256, 1024, 4096])
def test_float32_is_as_accurate_as_sgemm(depth, device):
    """Three TF32 products in tensor cores that truncate: no chain of them may be longer than a step of depth."""
    torch.manual_seed(0)
    x, weight = torch.randn(32, depth), torch.randn(1, depth, 32)
    layout = layout_of([[0]] * 32, 1)
    exact = x.double() @ weight[0].double()
    y = grouped_gemm(x.to(device), weight.to(device), on(layout, device)).cpu()
    assert relative_error(y, exact) <= 2 * relative_error(x @ weight[0], exact)
