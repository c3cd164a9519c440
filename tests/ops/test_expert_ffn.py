from __future__ import annotations

import pytest
import torch
from routed import DTYPES, as_leaves, assert_as_accurate, gate_dtype, gradients, layout_of, randn, random_layout

from moduleformer_ext import reference
from moduleformer_ext.ops import expert_ffn, grouped_gemm
from moduleformer_ext.reference.grouped_gemm import ACTIVATIONS, GATED


def operands(tokens, experts, choices, d, f, dtype, gated=False):
    return [
        randn(tokens, d, dtype=dtype),
        randn(experts, d, 2 * f if gated else f, dtype=dtype, scale=d**-0.5),
        randn(experts, f, d, dtype=dtype, scale=f**-0.5),
        torch.rand(tokens, choices, dtype=gate_dtype(dtype)),
    ]


def composed(x, up, down, layout, gates, activation):
    hidden = grouped_gemm(x, up, layout, activation=activation)
    return grouped_gemm(hidden, down, layout, x_order="expert", out_order="token", gates=gates)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_the_reference(activation, dtype):
    torch.manual_seed(0)
    gated = activation in GATED
    for tokens, experts, choices, d, f in ((33, 5, 2, 24, 40), (9, 4, 4, 17, 21), (300, 2, 1, 66, 70)):
        layout = random_layout(tokens, experts, choices)
        values = operands(tokens, experts, choices, d, f, dtype, gated)
        grad = randn(tokens, d, dtype=dtype)
        results = []
        for function, as_dtype in (
            (expert_ffn, dtype),
            (reference.expert_ffn, dtype),
            (reference.expert_ffn, torch.float64),
        ):
            inputs = as_leaves(*values, dtype=None if as_dtype == dtype else as_dtype)
            x, up, down, gates = inputs
            out = function(x, up, down, layout, gates, activation=activation)
            results.append([out, *gradients(out, inputs, grad)])
        for name, ours, theirs, truth in zip(("y", "dx", "dup", "ddown", "dgates"), *results, strict=True):
            assert_as_accurate(name, ours, theirs, truth, dtype)


def test_equals_its_parts_in_float64():
    torch.manual_seed(1)
    layout = random_layout(20, 4, 2)
    inputs = as_leaves(*operands(20, 4, 2, 12, 18, torch.float64))
    same = as_leaves(*inputs)
    out = expert_ffn(inputs[0], inputs[1], inputs[2], layout, inputs[3], activation="gelu")
    parts = composed(same[0], same[1], same[2], layout, same[3], "gelu")
    grad = torch.randn_like(out)
    for a, b in zip([out, *gradients(out, inputs, grad)], [parts, *gradients(parts, same, grad)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    torch.manual_seed(2)
    layout = random_layout(4, 3, 2)
    inputs = as_leaves(*operands(4, 3, 2, 3, 4, torch.float64, activation in GATED))
    assert torch.autograd.gradcheck(
        lambda x, up, down, gates: expert_ffn(x, up, down, layout, gates, activation=activation), inputs
    )


def test_segments_that_are_split_in_different_places():
    torch.manual_seed(3)
    layout = random_layout(30, 5, 2)
    x, up, down, gates = operands(30, 5, 2, 16, 24, torch.float32)
    ups, downs = as_leaves(up[:2], up[2:]), as_leaves(down[:1], down[1:4], down[4:])
    ups[0].requires_grad_(False)
    downs[1].requires_grad_(False)
    out = expert_ffn(x, ups, tuple(downs), layout, gates)
    whole = as_leaves(up, down)
    expected = expert_ffn(x, whole[0], whole[1], layout, gates)
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    assert ups[0].grad is None
    assert downs[1].grad is None
    assert torch.equal(ups[1].grad, whole[0].grad[2:])
    assert torch.equal(downs[0].grad, whole[1].grad[:1])
    assert torch.equal(downs[2].grad, whole[1].grad[4:])


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone(wanted):
    torch.manual_seed(4)
    layout = random_layout(12, 3, 2)
    values = operands(12, 3, 2, 8, 10, torch.float32)
    inputs = as_leaves(*values)
    x, up, down, gates = inputs
    grad = torch.randn(12, 8)
    every = gradients(expert_ffn(x, up, down, layout, gates), inputs, grad)
    values[wanted].requires_grad_()
    x, up, down, gates = values
    expert_ffn(x, up, down, layout, gates).backward(grad)
    assert torch.equal(values[wanted].grad, every[wanted])


def test_no_tokens():
    x, up, down, gates = as_leaves(*operands(0, 3, 2, 8, 10, torch.float32))
    out = expert_ffn(x, up, down, random_layout(0, 3, 2), gates)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert torch.equal(up.grad, torch.zeros_like(up))
    assert torch.equal(down.grad, torch.zeros_like(down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bitwise_for_any_number_of_threads(dtype):
    torch.manual_seed(5)
    layout = layout_of([[0, 1 + t % 3] for t in range(300)], 5)
    values = operands(300, 5, 2, 72, 140, dtype)
    grad = randn(300, 72, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            inputs = as_leaves(*values)
            x, up, down, gates = inputs
            out = expert_ffn(x, up, down, layout, gates)
            runs.append([out, *gradients(out, inputs, grad)])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_every_element_is_written():
    layout = layout_of([[0, 3], [3, 0], [0, 3]], 5)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        inputs = as_leaves(*operands(3, 5, 2, 7, 66, torch.float32))
        x, up, down, gates = inputs
        out = expert_ffn(x, up, down, layout, gates)
        assert all(r.isfinite().all() for r in [out, *gradients(out, inputs, torch.ones_like(out))])
    finally:
        torch.use_deterministic_algorithms(False)


def test_saves_no_output_of_a_product():
    layout = random_layout(10, 3, 2)
    x, up, down, gates = as_leaves(*operands(10, 3, 2, 8, 12, torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expert_ffn(x, up, down, layout, gates)
    inputs = {t.data_ptr() for t in (x, up, down, gates, layout.offsets, layout.slot_order, layout.position)}
    extra = [t.shape for t in saved if t.data_ptr() not in inputs]
    assert extra == [(20, 12)]  # the pre-activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    layout = random_layout(6, 3, 2)
    x, up, down, gates = as_leaves(*operands(6, 3, 2, 4, 6, dtype))
    first, second = as_leaves(up[:1], up[1:])
    tensors = (layout.offsets, layout.slot_order, layout.position, layout.num_choices)
    torch.library.opcheck(
        torch.ops.moduleformer_ext.expert_ffn.default, (x, [first, second], [down], *tensors, gates, "silu")
    )


def test_autocast_and_compile():
    layout = random_layout(16, 3, 2)
    x, up, down, gates = as_leaves(*operands(16, 3, 2, 8, 12, torch.float32))

    def f(x, up, down, gates):
        return expert_ffn(x, up, down, layout, gates, activation="relu")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = f(x, up, down, gates)
    assert torch.equal(out, f(x.bfloat16(), up.bfloat16(), down.bfloat16(), gates))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    same = as_leaves(x, up, down, gates)
    a, b = compiled(x, up, down, gates), f(*same)
    assert torch.equal(a, b)
    grad = torch.randn_like(a)
    for left, right in zip(gradients(a, [x, up, down, gates], grad), gradients(b, same, grad), strict=True):
        assert torch.equal(left, right)


LAYOUT = random_layout(4, 3, 2)
X, UP, DOWN, GATES = operands(4, 3, 2, 8, 6, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[:3]}, r"x must have shape \[4, features\] as the layout says, got shape \[3, 8\]"),
        ({"up": UP[:, :7]}, r"x must have as many features as up has rows \(7\), got 8"),
        ({"up": UP[:2]}, r"up must have as many experts as the layout \(3\), got 2"),
        ({"down": DOWN[:, :5]}, r"down must have shape \[num_experts, 6, 8\] beside this up, got shape \[3, 5, 8\]"),
        ({"activation": "swiglu"}, r"down must have shape \[num_experts, 3, 8\] beside this up"),
        ({"activation": "none"}, "activation must be one of"),
        ({"gates": GATES[:, :1]}, r"gates must have shape \[4, 2\] as the layout says, got shape \[4, 1\]"),
        ({"gates": GATES.bfloat16()}, "gates must be Float beside x of Float, got BFloat16"),
        ({"down": DOWN.half()}, r"down must have the dtype of x \(Float\), got Half"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"x": X, "up": UP, "down": DOWN, "layout": LAYOUT, "gates": GATES} | changes
    with pytest.raises(ValueError, match=f"expert_ffn: {message}"):
        expert_ffn(**arguments)
