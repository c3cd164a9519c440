"""Expert matrices however they lie in memory, and biases: grouped_gemm and expert_ffn."""

from __future__ import annotations

import pytest
import torch
from devices import cases_for
from routed import (
    DTYPES,
    as_leaves,
    compare,
    ffn_values,
    gradients,
    grouped_values,
    layout_of,
    on,
    randn,
    random_layout,
)
from strides import spaced
from torch import Tensor

from moduleformer_ext.ops import expert_ffn, grouped_gemm
from moduleformer_ext.reference.grouped_gemm import ACTIVATIONS

ORDERS = ("token", "slot", "expert")


def stored_transposed(weight: Tensor) -> Tensor:
    """The same values, in memory [E, out, in]."""
    return weight.transpose(1, 2).contiguous().transpose(1, 2)


def gapped(weight: Tensor) -> Tensor:
    """The same values as a part of larger matrices."""
    experts, rows, columns = weight.shape
    space = weight.new_full((experts + 1, rows + 3, columns + 8), torch.nan)
    return space[:experts, 2 : rows + 2, 8:].copy_(weight)


def gapped_and_transposed(weight: Tensor) -> Tensor:
    return gapped(weight.transpose(1, 2)).transpose(1, 2)


def inner_dimensions_apart(weight: Tensor) -> Tensor:
    """Neither of a matrix's dimensions is contiguous."""
    return weight.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def as_it_is(weight: Tensor) -> Tensor:
    return weight


def unevenly_spaced(weight: Tensor) -> Tensor:
    """Every row begins at a multiple of 16 bytes of its matrix, but not every matrix at one of memory."""
    return spaced(weight, 0)


def unevenly_spaced_and_transposed(weight: Tensor) -> Tensor:
    return spaced(weight.transpose(1, 2), 0).transpose(1, 2)


STORED = [
    stored_transposed,
    gapped,
    gapped_and_transposed,
    inner_dimensions_apart,
    unevenly_spaced,
    unevenly_spaced_and_transposed,
]


def name(function) -> str:
    return function.__name__


def biases_of(layout, dtype, **columns) -> dict[str, Tensor]:
    return {name: randn(layout.offsets.numel() - 1, n, dtype=dtype) for name, n in columns.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_order", ORDERS)
@pytest.mark.parametrize("out_order", ORDERS)
def test_a_transposed_weight_with_a_bias_in_every_order(x_order, out_order, dtype, device):
    torch.manual_seed(0)
    sizes = [(37, 5, 2, 24, 40), (11, 4, 3, 17, 33), (90, 1, 1, 40, 136)]
    for tokens, experts, choices, n, m in cases_for(device, sizes, cpu=[(150, 2, 1, 70, 130), (300, 1, 1, 64, 128)]):
        layout = random_layout(tokens, experts, choices)
        for gated in {False, out_order == "token"}:
            x, weight, gates = grouped_values(layout, x_order, n, m, dtype, gated)
            bias = biases_of(layout, dtype, bias=m)
            values = [x, stored_transposed(weight), gates]
            compare(grouped_gemm, layout, values, device, bias, x_order=x_order, out_order=out_order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "geglu_tanh", "swiglu"])
def test_a_bias_before_the_activation(activation, dtype, device):
    torch.manual_seed(1)
    sizes = [(29, 3, 24, 2 * 40), (60, 3, 17, 2 * 21)]
    for tokens, experts, n, m in cases_for(device, sizes, cpu=[(290, 2, 66, 2 * 130)]):
        layout = random_layout(tokens, experts, 2)
        for stored in (as_it_is, stored_transposed):
            x, weight, gates = grouped_values(layout, "token", n, m, dtype, True)
            bias = biases_of(layout, dtype, bias=m)
            values = [x, stored(weight), gates]
            compare(grouped_gemm, layout, values, device, bias, out_order="token", activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", STORED, ids=name)
def test_weights_wherever_they_lie(stored, dtype, device):
    torch.manual_seed(2)
    sizes = [(33, 5, 24, 40), (9, 4, 17, 21)]
    for tokens, experts, n, m in cases_for(device, sizes, cpu=[(300, 2, 66, 70)]):
        layout = on(random_layout(tokens, experts, 2), device)
        x, weight, _ = grouped_values(layout, "token", n, m, dtype)
        rows, plain = as_leaves(x, weight, device=device)
        lying = stored(weight.to(device)).requires_grad_()
        same = rows.detach().clone().requires_grad_()
        out, expected = (grouped_gemm(r, w, layout) for r, w in ((same, lying), (rows, plain)))
        grad = torch.randn_like(out)
        results = (out, *torch.autograd.grad(out, (same, lying), grad))
        wanted = (expected, *torch.autograd.grad(expected, (rows, plain), grad))
        tolerance = 1e-12 if dtype == torch.float64 else 3e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        for a, b in zip(results, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("up_stored", [as_it_is, stored_transposed], ids=name)
@pytest.mark.parametrize("down_stored", [as_it_is, stored_transposed], ids=name)
def test_expert_ffn(down_stored, up_stored, activation, dtype, device):
    torch.manual_seed(3)
    sizes = [(33, 5, 2, 24, 40), (9, 4, 4, 17, 21)]
    for tokens, experts, choices, d, f in cases_for(device, sizes, cpu=[(300, 2, 1, 66, 70), (400, 1, 1, 136, 200)]):
        layout = random_layout(tokens, experts, choices)
        x, up, down, gates = ffn_values(layout, d, f, dtype, activation)
        biases = biases_of(layout, dtype, up_bias=up.shape[2], down_bias=d)
        values = [x, up_stored(up), down_stored(down), gates]
        results = compare(expert_ffn, layout, values, device, biases, activation=activation)
        assert results[2].stride() == values[1].stride()
        assert results[3].stride() == values[2].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("up_stored", [unevenly_spaced, unevenly_spaced_and_transposed], ids=name)
def test_experts_of_an_ffn_at_odd_distances(up_stored, dtype, device):
    """In segments, of which one has a single matrix and so no distance."""
    torch.manual_seed(11)
    layout = on(random_layout(33, 5, 2), device)
    x, up, down, gates = as_leaves(*ffn_values(layout, 24, 40, dtype, "swiglu"), device=device)
    odd_up, odd_down = up_stored(up.detach()).split([4, 1]), unevenly_spaced(down.detach())
    lying = [t.requires_grad_() for t in (*odd_up, odd_down)]
    same = [t.detach().requires_grad_() for t in (x, gates)]
    out = expert_ffn(same[0], lying[:2], lying[2], layout, same[1], activation="swiglu")
    expected = expert_ffn(x, up, down, layout, gates, activation="swiglu")
    grad = torch.randn_like(out)
    *grads, first, last, grad_down = gradients(out, [*same, *lying], grad)
    wanted = (expected, *gradients(expected, [x, gates, up, down], grad))
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for a, b in zip((out, *grads, torch.cat((first, last)), grad_down), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 128, 129, 300])
def test_rows_of_an_expert_around_the_tiles_edges(rows, dtype, device):
    torch.manual_seed(4)
    layout = layout_of([[1]] * rows + [[2]], 3)
    x, weight, gates = grouped_values(layout, "token", 72, 136, dtype)
    bias = biases_of(layout, dtype, bias=136)
    compare(grouped_gemm, layout, [x, stored_transposed(weight), gates], device, bias, out_order="slot")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 9), (9, 1), (8, 8), (31, 127), (33, 129), (128, 256), (520, 24)])
def test_features_around_the_tiles_edges(n, m, dtype, device):
    torch.manual_seed(5)
    for tokens in (3, 40, 150):
        layout = random_layout(tokens, 2, 2)
        x, weight, gates = grouped_values(layout, "token", n, m, dtype, True)
        bias = biases_of(layout, dtype, bias=m)
        compare(grouped_gemm, layout, [x, stored_transposed(weight), gates], device, bias, out_order="token")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [20, 70])
def test_features_beyond_one_panel_of_depth(tokens, dtype):
    torch.manual_seed(6)
    layout = random_layout(tokens, 3, 2)
    for n, m in ((4200, 66), (66, 2100)):
        weight = stored_transposed(randn(3, n, m, dtype=dtype, scale=n**-0.5))
        values = [randn(tokens, n, dtype=dtype), weight, None]
        compare(grouped_gemm, layout, values, torch.device("cpu"), activation="swiglu")


@pytest.mark.parametrize("stored", [as_it_is, stored_transposed], ids=name)
def test_gradcheck(stored):
    torch.manual_seed(7)
    layout = random_layout(5, 3, 2)
    x, up, down, gates = ffn_values(layout, 3, 4, torch.float64, "swiglu")
    biases = biases_of(layout, torch.float64, up_bias=8, down_bias=3)
    inputs = as_leaves(x, stored(up), stored(down), gates, *biases.values())

    def ffn(x, up, down, gates, up_bias, down_bias):
        return expert_ffn(
            x, [up[:1], up[1:]], down, layout, gates, activation="swiglu", up_bias=up_bias, down_bias=down_bias
        )

    assert torch.autograd.gradcheck(ffn, inputs)
    for activation in (None, *ACTIVATIONS):

        def combine(x, weight, gates, bias, activation=activation):
            return grouped_gemm(
                x, weight, layout, out_order="token", gates=gates, activation=activation, bias=[bias[:2], bias[2:]]
            )

        assert torch.autograd.gradcheck(combine, [inputs[0], inputs[1], inputs[3], inputs[4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    layout = random_layout(6, 3, 2)
    x, up, down, gates = ffn_values(layout, 4, 6, dtype, "swiglu")
    x, first, second, down, gates, up_bias, down_bias = as_leaves(
        x,
        stored_transposed(up[:1]),
        stored_transposed(up[1:]),
        stored_transposed(down),
        gates,
        *biases_of(layout, dtype, up_bias=12, down_bias=4).values(),
    )
    tensors = (layout.offsets, layout.slot_order, layout.position, layout.num_choices)
    ops = torch.ops.moduleformer_ext
    arguments = (x, [first, second], [down], *tensors, gates, "swiglu", up_bias, down_bias)
    torch.library.opcheck(ops.expert_ffn.default, arguments)
    for activation in (None, "gelu"):
        arguments = (x, [first, second], *tensors, "token", "token", gates, activation, up_bias)
        torch.library.opcheck(ops.grouped_gemm.default, arguments)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_linear_layers_weight_gets_its_gradient_without_a_copy(compiled):
    """As in transformers: the parameter is [E, out, in], the op sees its transpose."""
    layout = random_layout(40, 3, 2)
    x, weight = randn(40, 16), randn(3, 24, 16).requires_grad_()

    def f(x, weight):
        return grouped_gemm(x, weight.transpose(1, 2), layout, activation="swiglu")

    g = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
    g(x, weight).sum().backward()
    assert weight.grad.is_contiguous()
    plain = weight.detach().transpose(1, 2).contiguous().requires_grad_()
    grouped_gemm(x, plain, layout, activation="swiglu").sum().backward()
    torch.testing.assert_close(weight.grad.transpose(1, 2), plain.grad)


def test_segments_that_lie_differently_are_served_too(device):
    torch.manual_seed(8)
    layout = on(random_layout(40, 4, 2), device)
    x, weight, _ = grouped_values(layout, "token", 16, 24, torch.float32)
    x, parts = x.to(device), [weight[:1].to(device), stored_transposed(weight[1:]).to(device)]
    leaves = as_leaves(*parts)
    whole = weight.to(device).requires_grad_()
    out, expected = grouped_gemm(x, leaves, layout), grouped_gemm(x, whole, layout)
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    for a, b in zip(gradients(out, leaves, grad), gradients(expected, [whole], grad)[0].split([1, 3]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", range(6))
def test_each_gradient_alone(wanted, device):
    torch.manual_seed(9)
    layout = on(random_layout(12, 3, 2), device)
    x, up, down, gates = ffn_values(layout, 8, 10, torch.float32)
    values = [
        x,
        stored_transposed(up),
        down,
        gates,
        *biases_of(layout, torch.float32, up_bias=10, down_bias=8).values(),
    ]
    values = [v.to(device) for v in values]

    def f(x, up, down, gates, up_bias, down_bias):
        return expert_ffn(x, up, down, layout, gates, up_bias=up_bias, down_bias=down_bias)

    inputs = as_leaves(*values)
    grad = torch.randn(12, 8).to(device)
    every = gradients(f(*inputs), inputs, grad)
    values[wanted].requires_grad_()
    f(*values).backward(grad)
    assert torch.equal(values[wanted].grad, every[wanted])


def test_no_tokens(device):
    layout = on(random_layout(0, 3, 2), device)
    x, up, down, gates, bias = as_leaves(*ffn_values(layout, 8, 10, torch.float32), torch.randn(3, 10), device=device)
    out = expert_ffn(x, up, down, layout, gates, up_bias=bias)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [20, 300])
def test_repeats_bitwise_for_any_number_of_threads(tokens, dtype, set_threads):
    torch.manual_seed(10)
    layout = layout_of([[0, 1 + t % 3] for t in range(tokens)], 5)
    x, up, down, gates = ffn_values(layout, 72, 140, dtype, "swiglu")
    biases = biases_of(layout, dtype, up_bias=280, down_bias=72)
    values = [x, stored_transposed(up), stored_transposed(down), gates, *biases.values()]
    grad = randn(tokens, 72, dtype=dtype)
    runs = []
    for count in (1, 2, 3, 2, 1):
        set_threads(count)
        inputs = as_leaves(*values)
        x, up, down, gates, up_bias, down_bias = inputs
        out = expert_ffn(x, up, down, layout, gates, activation="swiglu", up_bias=up_bias, down_bias=down_bias)
        runs.append([out, *gradients(out, inputs, grad)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.usefixtures("new_memory_is_nan")
def test_every_element_is_written():
    layout = layout_of([[0, 3], [3, 0], [0, 3]], 5)
    x, up, down, gates = ffn_values(layout, 7, 66, torch.float32)
    biases = biases_of(layout, torch.float32, up_bias=66, down_bias=7)
    inputs = as_leaves(x, stored_transposed(up), stored_transposed(down), gates, *biases.values())
    x, up, down, gates, up_bias, down_bias = inputs
    out = expert_ffn(x, up, down, layout, gates, up_bias=up_bias, down_bias=down_bias)
    results = [out, *gradients(out, inputs, torch.ones_like(out))]
    assert all(r.isfinite().all() for r in results)
    assert (results[-1][[1, 2, 4]] == 0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_other_experts_biases_reach_nobody(poison, device):
    layout = on(layout_of([[t % 2] for t in range(40)], 3), device)
    x, weight, bias = randn(40, 8), stored_transposed(randn(3, 8, 16)), randn(3, 16)
    bias[1], weight[1] = poison, poison
    x[1::2] = poison
    inputs = as_leaves(x, weight, bias, device=device)
    out = grouped_gemm(inputs[0], inputs[1], layout, out_order="slot", bias=inputs[2])
    assert out[::2].isfinite().all()
    grads = gradients(out, inputs, torch.ones(40, 1, 16))
    assert grads[0][::2].isfinite().all()
    assert grads[1][[0, 2]].isfinite().all()
    assert grads[2].isfinite().all()


def test_autocast_lowers_biases(device):
    layout = on(random_layout(20, 4, 2), device)
    values = [*ffn_values(layout, 16, 8, torch.float32), torch.randn(4, 8), torch.randn(4, 16)]
    x, up, down, gates, up_bias, down_bias = as_leaves(*values, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = expert_ffn(x, up, down, layout, gates, up_bias=up_bias, down_bias=down_bias)
    low = [t.bfloat16() for t in (x, up, down)]
    biases = {"up_bias": up_bias.bfloat16(), "down_bias": down_bias.bfloat16()}
    assert torch.equal(out, expert_ffn(*low, layout, gates, **biases))
    out.sum().backward()
    assert {t.grad.dtype for t in (x, up, down, gates, up_bias, down_bias)} == {torch.float32}


LAYOUT = random_layout(4, 3, 2)
X, UP, DOWN, GATES = ffn_values(LAYOUT, 8, 6, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up_bias": torch.zeros(3, 8)}, r"up_bias must have shape \[3, 6\], got shape \[3, 8\]"),
        ({"up_bias": torch.zeros(6)}, r"up_bias must have shape \[3, 6\], got shape \[6\]"),
        ({"up_bias": [torch.zeros(2, 6)]}, r"up_bias must have shape \[3, 6\], got shape \[2, 6\]"),
        ({"up_bias": 3}, "up_bias must be a tensor or a sequence of tensors, got int"),
        ({"down_bias": torch.zeros(2, 8)}, r"down_bias must have shape \[3, 8\], got shape \[2, 8\]"),
        ({"down_bias": torch.zeros(3, 8).half()}, "down_bias must be Float, got Half"),
        ({"down_bias": torch.zeros(3, 8, device="meta")}, r"down_bias must be on the device of x \(cpu\), got meta"),
    ],
)
def test_bad_biases(changes, message):
    arguments = {"x": X, "up": UP, "down": DOWN, "layout": LAYOUT, "gates": GATES} | changes
    with pytest.raises(ValueError, match=f"expert_ffn: {message}"):
        expert_ffn(**arguments)


def test_a_parameter_list_is_a_sequence_of_segments():
    up, down = (torch.nn.ParameterList(weight.detach().clone().split([1, 2])) for weight in (UP, DOWN))
    y = expert_ffn(X, up, down, LAYOUT, GATES)
    assert torch.equal(y, expert_ffn(X, UP, DOWN, LAYOUT, GATES))
    y.sum().backward()
    assert all(part.grad is not None for part in (*up, *down))
    with pytest.raises(ValueError, match="expert_ffn: up must be a tensor or a sequence of tensors, got ModuleList"):
        expert_ffn(X, torch.nn.ModuleList(), down, LAYOUT, GATES)


def test_bad_bias_of_one_product():
    with pytest.raises(ValueError, match=r"grouped_gemm: bias must have shape \[3, 6\], got shape \[3, 5\]"):
        grouped_gemm(X, UP, LAYOUT, bias=torch.zeros(3, 5))


@pytest.mark.parametrize(("stored", "copies"), [*((s, s is inner_dimensions_apart) for s in STORED)])
def test_only_a_weight_that_cannot_be_read_is_copied(stored, copies):
    layout = random_layout(40, 4, 2)
    x, weight, _ = grouped_values(layout, "token", 16, 24, torch.float32)
    weight = stored(weight)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        grouped_gemm(x, weight, layout)
    assert ("aten::clone" in {event.key for event in profile.key_averages()}) == copies
