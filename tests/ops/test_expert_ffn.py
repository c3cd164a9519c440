from __future__ import annotations

import pytest
import torch
from devices import cases_for
from routed import DTYPES, as_leaves, compare, ffn_values, gradients, layout_of, on, randn, random_layout

from moduleformer_ext.ops import expert_ffn, grouped_gemm
from moduleformer_ext.reference.grouped_gemm import ACTIVATIONS


def composed(x, up, down, layout, gates, activation):
    hidden = grouped_gemm(x, up, layout, activation=activation)
    return grouped_gemm(hidden, down, layout, x_order="expert", out_order="token", gates=gates)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_the_reference(activation, dtype, device):
    torch.manual_seed(0)
    sizes = [(33, 5, 2, 24, 40), (9, 4, 4, 17, 21), (300, 3, 1, 72, 136)]
    for tokens, experts, choices, d, f in cases_for(device, sizes, cpu=[(300, 2, 1, 66, 70)]):
        layout = random_layout(tokens, experts, choices)
        compare(expert_ffn, layout, ffn_values(layout, d, f, dtype, activation), device, activation=activation)


def test_equals_its_parts_in_float64():
    torch.manual_seed(1)
    layout = random_layout(20, 4, 2)
    inputs = as_leaves(*ffn_values(layout, 12, 18, torch.float64))
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
    inputs = as_leaves(*ffn_values(layout, 3, 4, torch.float64, activation))
    assert torch.autograd.gradcheck(
        lambda x, up, down, gates: expert_ffn(x, up, down, layout, gates, activation=activation), inputs
    )


def test_segments_that_are_split_in_different_places(device):
    torch.manual_seed(3)
    layout = on(random_layout(30, 5, 2), device)
    x, up, down, gates = (t.to(device) for t in ffn_values(layout, 16, 24, torch.float32))
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
def test_each_gradient_alone(wanted, device):
    torch.manual_seed(4)
    layout = on(random_layout(12, 3, 2), device)
    values = [t.to(device) for t in ffn_values(layout, 8, 10, torch.float32)]
    inputs = as_leaves(*values)
    x, up, down, gates = inputs
    grad = torch.randn(12, 8).to(device)
    every = gradients(expert_ffn(x, up, down, layout, gates), inputs, grad)
    values[wanted].requires_grad_()
    x, up, down, gates = values
    expert_ffn(x, up, down, layout, gates).backward(grad)
    assert torch.equal(values[wanted].grad, every[wanted])


def test_no_tokens(device):
    layout = on(random_layout(0, 3, 2), device)
    x, up, down, gates = as_leaves(*ffn_values(layout, 8, 10, torch.float32), device=device)
    out = expert_ffn(x, up, down, layout, gates)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert torch.equal(up.grad, torch.zeros_like(up))
    assert torch.equal(down.grad, torch.zeros_like(down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bitwise_for_any_number_of_threads(dtype, set_threads):
    torch.manual_seed(5)
    layout = layout_of([[0, 1 + t % 3] for t in range(300)], 5)
    values = ffn_values(layout, 72, 140, dtype)
    grad = randn(300, 72, dtype=dtype)
    runs = []
    for count in (1, 2, 3, 2, 1):
        set_threads(count)
        inputs = as_leaves(*values)
        x, up, down, gates = inputs
        out = expert_ffn(x, up, down, layout, gates)
        runs.append([out, *gradients(out, inputs, grad)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.usefixtures("new_memory_is_nan")
def test_every_element_is_written():
    layout = layout_of([[0, 3], [3, 0], [0, 3]], 5)
    inputs = as_leaves(*ffn_values(layout, 7, 66, torch.float32))
    x, up, down, gates = inputs
    out = expert_ffn(x, up, down, layout, gates)
    assert all(r.isfinite().all() for r in [out, *gradients(out, inputs, torch.ones_like(out))])


def test_saves_no_output_of_a_product():
    layout = random_layout(10, 3, 2)
    x, up, down, gates = as_leaves(*ffn_values(layout, 8, 12, torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expert_ffn(x, up, down, layout, gates)
    inputs = {t.data_ptr() for t in (x, up, down, gates, layout.offsets, layout.slot_order, layout.position)}
    extra = [t.shape for t in saved if t.data_ptr() not in inputs]
    assert extra == [(20, 12)]  # the pre-activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    layout = random_layout(6, 3, 2)
    x, up, down, gates = as_leaves(*ffn_values(layout, 4, 6, dtype))
    first, second = as_leaves(up[:1], up[1:])
    tensors = (layout.offsets, layout.slot_order, layout.position, layout.num_choices)
    torch.library.opcheck(
        torch.ops.moduleformer_ext.expert_ffn.default, (x, [first, second], [down], *tensors, gates, "silu", None, None)
    )


def test_autocast_and_compile():
    layout = random_layout(16, 3, 2)
    x, up, down, gates = as_leaves(*ffn_values(layout, 8, 12, torch.float32))

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
X, UP, DOWN, GATES = ffn_values(LAYOUT, 8, 6, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X[:3]}, r"x must have shape \[4, features\] as the layout says, got shape \[3, 8\]"),
        ({"up": UP[:, :7]}, r"x must have as many features as up has rows \(7\), got 8"),
        ({"up": UP[:2]}, r"up must have as many experts as the layout \(3\), got 2"),
        (
            {"down": DOWN[:, :5]},
            r"down must have shape \[num_experts, 6, 8\] beside this up, got shape \[num_experts, 5, 8\]",
        ),
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
