from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from devices import cases_for, on_cuda
from instruction_sets import run_with
from routed import (
    CPU,
    DTYPES,
    as_leaves,
    compare,
    gradients,
    grouped_values,
    layout_of,
    on,
    randn,
    random_layout,
    relative_error,
    rows_shape,
)

from moduleformer_ext import reference
from moduleformer_ext.nn.experts import GATED_ACTIVATIONS
from moduleformer_ext.ops import expert_layout, grouped_gemm
from moduleformer_ext.reference.grouped_gemm import ACTIVATIONS

ORDERS = ("token", "slot", "expert")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("x_order", "out_order"), list(itertools.product(ORDERS, ORDERS)))
def test_orders(x_order, out_order, dtype, device):
    torch.manual_seed(0)
    sizes = [(37, 5, 2, 24, 40), (11, 4, 3, 17, 33), (90, 1, 1, 40, 136)]
    for tokens, experts, choices, n, m in cases_for(device, sizes, cpu=[(150, 2, 1, 70, 130)]):
        layout = random_layout(tokens, experts, choices)
        for gated in {False, out_order == "token"}:
            values = grouped_values(layout, x_order, n, m, dtype, gated)
            compare(grouped_gemm, layout, values, device, x_order=x_order, out_order=out_order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, device):
    torch.manual_seed(1)
    cuda = [(29, 3, 24, 2 * 40, 1.0), (60, 3, 17, 2 * 21, 1.0), (90, 3, 32, 2 * 72, 1.0)]
    for tokens, experts, n, m, scale in cuda if on_cuda(device) else [(29, 6, 20, 2 * 35, 2.0)]:
        layout = random_layout(tokens, experts, 2)
        for out_order, gated in (("expert", False), ("token", True)):
            values = grouped_values(layout, "token", n, m, dtype, gated, scale)
            compare(grouped_gemm, layout, values, device, out_order=out_order, activation=activation)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_beyond_one_panel_of_depth(dtype):
    torch.manual_seed(2)
    layout = random_layout(20, 3, 2)
    deep = [randn(20, 2100, dtype=dtype), randn(3, 2100, 66, dtype=dtype, scale=0.02), None]
    compare(grouped_gemm, layout, deep, CPU, activation="swiglu")
    wide = [randn(20, 66, dtype=dtype), randn(3, 66, 2101, dtype=dtype, scale=0.1), None]
    compare(grouped_gemm, layout, wide, CPU, out_order="token")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_takes_all_and_the_others_get_zero_gradients(dtype, device):
    torch.manual_seed(3)
    for tokens, taken, experts, n, m in cases_for(device, [(70, 34, 40, 40, 72)], cpu=[(700, 2, 4, 33, 65)]):
        layout = layout_of([[taken]] * tokens, experts)
        _, _, grad_weight = compare(grouped_gemm, layout, grouped_values(layout, "token", n, m, dtype), device)
        assert (grad_weight[:taken] == 0).all()
        assert (grad_weight[taken + 1 :] == 0).all()
        assert (grad_weight[taken] != 0).any()


def test_every_expert_is_chosen(device):
    torch.manual_seed(4)
    layout = random_layout(9, 4, 4)
    compare(
        grouped_gemm, layout, grouped_values(layout, "token", 12, 20, torch.float32, True), device, out_order="token"
    )


@pytest.mark.parametrize("x_order", ORDERS)
@pytest.mark.parametrize("out_order", ORDERS)
def test_no_tokens(x_order, out_order, device):
    layout = on(random_layout(0, 3, 2), device)
    x = torch.zeros(rows_shape(x_order, layout, 8), device=device, requires_grad=True)
    weight = torch.randn(3, 8, 6).to(device).requires_grad_()
    out = grouped_gemm(x, weight, layout, x_order=x_order, out_order=out_order, activation="silu")
    assert out.shape == rows_shape(out_order, layout, 6)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_one_list_of_activations():
    """The error names those that the parser knows; plain PyTorch, layers and documentation have the same."""
    layout, x, weight = layout_of([[0]], 1), randn(1, 4), randn(1, 4, 4)
    with pytest.raises(ValueError, match="activation must be one of") as raised:
        grouped_gemm(x, weight, layout, activation="")
    named = re.findall(r"'(\w+)'", str(raised.value))
    assert sorted(named) == sorted(ACTIVATIONS)
    gated = {name for name in named if grouped_gemm(x, weight, layout, activation=name).shape[-1] == 2}
    assert gated == GATED_ACTIVATIONS
    page = (Path(__file__).parents[2] / "docs" / "ops" / "grouped_gemm.md").read_text(encoding="utf-8")
    listed = re.search(r"## Activations\n\n(.*?):\n", page, re.DOTALL)[1]
    assert re.findall(r"`(\w+)`", listed) == named
    docstring = re.search(r"\bactivation: None;(.*?), which", grouped_gemm.__doc__, re.DOTALL)[1]
    assert re.findall(r'"(\w+)"', docstring) == named


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_gradcheck(activation):
    torch.manual_seed(5)
    layout = random_layout(5, 3, 2)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(n, 3, 4, dtype=torch.float64, requires_grad=True) for n in (1, 2)]
    gates = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)

    def combine(x, gates, *weights):
        return grouped_gemm(x, weights, layout, out_order="token", gates=gates, activation=activation)

    assert torch.autograd.gradcheck(combine, (x, gates, *weights))
    slots = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *w: grouped_gemm(x, w, layout, x_order="slot", out_order="slot", activation=activation),
        (slots, *weights),
    )


@pytest.mark.parametrize("frozen", [[], [2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_equal_one_tensor(dtype, frozen, device):
    torch.manual_seed(6)
    layout = on(random_layout(40, 6, 2), device)
    x, weight = randn(40, 16, dtype=dtype).to(device), randn(6, 16, 24, dtype=dtype).to(device)
    whole, leaf = as_leaves(x, weight)
    rows, *parts = as_leaves(x, weight[:1], weight[1:1], weight[1:4], weight[4:])
    for i in frozen:
        parts[i].requires_grad_(False)
    out = grouped_gemm(whole, leaf, layout, activation="gelu")
    split = grouped_gemm(rows, tuple(parts), layout, activation="gelu")
    assert torch.equal(out, split)
    grad = torch.randn_like(out)
    out.backward(grad)
    split.backward(grad)
    assert torch.equal(whole.grad, rows.grad)
    for i, (part, expected) in enumerate(zip(parts, leaf.grad.split([1, 0, 3, 2]), strict=True)):
        if i in frozen:
            assert part.grad is None
        else:
            assert torch.equal(part.grad, expected)


def test_gradients_only_where_required(device):
    layout = on(random_layout(12, 4, 2), device)
    x, frozen = torch.randn(12, 8).to(device), torch.randn(3, 8, 6).to(device)
    new = torch.randn(1, 8, 6).to(device).requires_grad_()
    out = grouped_gemm(x, (frozen, new), layout, out_order="token", gates=torch.rand(12, 2).to(device))
    out.sum().backward()
    assert new.grad is not None
    assert frozen.grad is None
    assert x.grad is None
    with torch.no_grad():
        assert not grouped_gemm(x, new.expand(4, 8, 6), layout).requires_grad

    op = torch.ops.moduleformer_ext.grouped_gemm_backward
    arguments = op_arguments(layout, x, [frozen, new], "expert")
    grads = op(torch.randn(24, 6).to(device), *arguments, x.new_empty(0), False, False, False, [False, True])
    assert [g.numel() for g in grads] == [0, 0, 0, 0, new.numel()]


def test_rows_need_neither_contiguity_nor_alignment(device):
    torch.manual_seed(7)
    layout = on(random_layout(10, 3, 2), device)
    weight = torch.randn(3, 5, 16).to(device).transpose(1, 2)
    slots = torch.randn(2, 10, 16).to(device).transpose(0, 1)
    wide = torch.randn(10, 40).to(device)
    same_bits = not on_cuda(device)  # whose kernels differ with the alignment of rows
    columns = torch.randn(16, 10).to(device).t()
    tokens = (wide[:, 4:20], wide[:, 3:19], wide.t()[:16, :].t(), columns)
    for x, x_order, out_order in (
        (slots, "slot", "slot"),
        (slots, "slot", "token"),
        *((t, "token", "token") for t in tokens),
    ):
        leaf, same = x.detach().requires_grad_(), x.contiguous().detach().requires_grad_()
        out = grouped_gemm(leaf, weight, layout, x_order=x_order, out_order=out_order)
        expected = grouped_gemm(same, weight, layout, x_order=x_order, out_order=out_order)
        torch.testing.assert_close(out, expected, **({"rtol": 0, "atol": 0} if same_bits else {}))
        out.sum().backward()  # an expanded gradient
        plain = x.detach().cpu().clone().requires_grad_()
        reference.grouped_gemm(
            plain, weight.cpu(), on(layout, CPU), x_order=x_order, out_order=out_order
        ).sum().backward()
        torch.testing.assert_close(leaf.grad.cpu(), plain.grad)


def run_everything(layout, dtype):
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(300, 72, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(5, 72, 140, generator=generator).to(dtype).requires_grad_()
    gates = torch.rand(300, 2, generator=generator).requires_grad_()
    out = grouped_gemm(x, weight, layout, out_order="token", gates=gates, activation="swiglu")
    mapped = grouped_gemm(x, weight, layout, out_order="token", gates=gates)
    (out.sum() + mapped.square().sum()).backward()
    return out, mapped, x.grad, weight.grad, gates.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bitwise_for_any_number_of_threads(dtype, set_threads):
    layout = layout_of([[0, 1 + t % 3] for t in range(300)], 5)
    runs = []
    for count in (1, 2, 3, 2, 1):
        set_threads(count)
        runs.append(run_everything(layout, dtype))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.usefixtures("new_memory_is_nan")
def test_every_element_is_written():
    layout = layout_of([[0, 3], [3, 0], [0, 3]], 5)
    x = torch.randn(3, 7, requires_grad=True)
    weight = torch.randn(5, 7, 66, requires_grad=True)
    gates = torch.rand(3, 2, requires_grad=True)
    for out_order, activation in itertools.product(ORDERS, (None, "gelu", "reglu")):
        g = gates if out_order == "token" else None
        out = grouped_gemm(x, weight, layout, out_order=out_order, gates=g, activation=activation)
        results = [out, *gradients(out, [x, weight, g], torch.ones_like(out))]
        assert all(r.isfinite().all() for r in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite_stays_alone(dtype, device):
    layout = layout_of([[t % 3] for t in range(31)], 3)
    x, weight = randn(31, 9, dtype=dtype), randn(3, 9, 21, dtype=dtype)
    x[4] = torch.inf
    weight[2, 0, 0] = torch.nan
    out = grouped_gemm(x.to(device), weight.to(device), on(layout, device), out_order="slot").reshape(31, 21).cpu()
    clean = torch.ones(31, 21, dtype=torch.bool)
    clean[4], clean[2::3, 0] = False, False
    assert out[clean].isfinite().all()
    assert not out[~clean].isfinite().any()


def test_autocast_lowers_rows_and_matrices_but_not_gates(device):
    layout = on(random_layout(20, 4, 2), device)
    x, weight, gates = as_leaves(torch.randn(20, 16), torch.randn(4, 16, 8), torch.rand(20, 2), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = grouped_gemm(x, weight, layout, out_order="token", gates=gates)
    assert torch.equal(out, grouped_gemm(x.bfloat16(), weight.bfloat16(), layout, out_order="token", gates=gates))
    out.sum().backward()
    assert {t.grad.dtype for t in (x, weight, gates)} == {torch.float32}


@pytest.mark.parametrize("depth", [256, 1024, 4096])
def test_float32_is_as_accurate_as_sgemm(depth, device):
    """Three TF32 products in tensor cores that truncate: no chain of them may be longer than a step of depth."""
    torch.manual_seed(0)
    x, weight = torch.randn(32, depth), torch.randn(1, depth, 32)
    layout = layout_of([[0]] * 32, 1)
    exact = x.double() @ weight[0].double()
    y = grouped_gemm(x.to(device), weight.to(device), on(layout, device)).cpu()
    assert relative_error(y, exact) <= 2 * relative_error(x @ weight[0], exact)


def op_arguments(layout, x, weights, out_order="token", gates=None, activation=None, bias=None):
    tensors = (layout.offsets, layout.slot_order, layout.position, layout.num_choices)
    return (x, weights, *tensors, "token", out_order, gates, activation, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    op = torch.ops.moduleformer_ext.grouped_gemm.default
    layout = random_layout(6, 3, 2)
    x, first, second, gates = as_leaves(
        randn(6, 4, dtype=dtype), randn(1, 4, 6, dtype=dtype), randn(2, 4, 6, dtype=dtype), torch.rand(6, 2)
    )
    for out_order, g, activation in (("token", gates, "swiglu"), ("expert", None, "silu"), ("slot", None, None)):
        torch.library.opcheck(op, op_arguments(layout, x, [first, second], out_order, g, activation))
    torch.library.opcheck(op, op_arguments(random_layout(0, 3, 2), x[:0].detach(), [first, second]))


def test_compiles_to_one_graph_for_any_number_of_tokens():
    weight = torch.randn(3, 8, 12, requires_grad=True)

    def f(x, gates, ids, weight):
        layout = torch.ops.moduleformer_ext.expert_layout(ids, 3)
        args = op_arguments_from(layout, x, weight, gates)
        return torch.ops.moduleformer_ext.grouped_gemm(*args)

    def op_arguments_from(layout, x, weight, gates):
        return (x, [weight], layout[1], layout[2], layout[3], 2, "token", "token", gates, "geglu", None)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        ids = torch.rand(tokens, 3).argsort(1)[:, :2].int()
        inputs = as_leaves(torch.randn(tokens, 8), torch.rand(tokens, 2))
        same = as_leaves(*inputs)
        out, expected = compiled(*inputs, ids, weight), f(*same, ids, weight)
        assert torch.equal(out, expected)
        grad = torch.randn_like(out)
        for a, b in zip(
            gradients(out, [*inputs, weight], grad), gradients(expected, [*same, weight], grad), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("transposed", [False, True])
def test_exports(transposed):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 5, 8) if transposed else torch.randn(3, 8, 5))
            self.bias = torch.nn.Parameter(torch.randn(3, 5))

        def forward(self, x, ids):
            weight = self.weight.transpose(1, 2) if transposed else self.weight
            layout = expert_layout(ids, 3)
            return grouped_gemm(x, weight, layout, out_order="slot", activation="relu", bias=self.bias)

    layer, tokens = Layer(), torch.export.Dim("tokens", min=2)
    ids = torch.rand(7, 3).argsort(1)[:, :2].int()
    program = torch.export.export(layer, (torch.randn(7, 8), ids), dynamic_shapes=({0: tokens}, {0: tokens}))
    x, ids = torch.randn(4, 8), ids[:4]
    assert torch.equal(program.module()(x, ids), layer(x, ids))


LAYOUT = random_layout(4, 3, 2)
X, W = torch.randn(4, 8), torch.randn(3, 8, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.int()}, "x must be float32, float64, bfloat16 or float16, got Int"),
        ({"x": X[None]}, r"x must have shape \[4, features\] as the layout says, got shape \[1, 4, 8\]"),
        ({"x": X[:3]}, r"x must have shape \[4, features\] as the layout says, got shape \[3, 8\]"),
        ({"x": X, "x_order": "slot"}, r"x must have shape \[4, 2, features\] as the layout says"),
        ({"x": X, "x_order": "expert"}, r"x must have shape \[8, features\] as the layout says"),
        ({"x": X[:, :7]}, r"x must have as many features as weight has rows \(8\), got 7"),
        ({"x_order": "tokens"}, "x_order must be 'token', 'slot' or 'expert', got 'tokens'"),
        ({"out_order": ""}, "out_order must be 'token', 'slot' or 'expert', got ''"),
        ({"activation": "tanh"}, "activation must be one of 'gelu_tanh', .*, got 'tanh'"),
        ({"weight": W.double()}, r"weight must have the dtype of x \(Float\), got Double"),
        ({"weight": W[0]}, r"weight must have 3 dimensions, got shape \[8, 6\]"),
        ({"weight": W[:2]}, r"weight must have as many experts as the layout \(3\), got 2"),
        (
            {"weight": (W[:1], torch.randn(2, 8, 5))},
            "weight must have segments that agree in their last two dimensions",
        ),
        ({"weight": ()}, "weight must be a tensor or a non-empty sequence of tensors, got none"),
        ({"weight": 3}, "weight must be a tensor or a sequence of tensors, got int"),
        ({"weight": W[:, :, :5], "activation": "swiglu"}, "weight must have an even number of columns .*, got 5"),
        ({"weight": W.to("meta")}, r"weight must be on the device of x \(cpu\), got meta"),
        (
            {"gates": torch.rand(4, 2), "out_order": "slot"},
            "out_order must be 'token' where gates are given",
        ),
        ({"gates": torch.rand(4, 3), "out_order": "token"}, r"gates must have shape \[4, 2\] as the layout says"),
        (
            {"gates": torch.rand(4, 2).double(), "out_order": "token"},
            "gates must be Float beside x of Float",
        ),
        ({"layout": LAYOUT._replace(offsets=LAYOUT.offsets.long())}, "layout.offsets must be int32, got Long"),
        ({"layout": LAYOUT._replace(position=LAYOUT.position[:7])}, "layout.position must have as many elements"),
        ({"layout": LAYOUT._replace(num_choices=3)}, r"layout.slot_order must have a multiple of num_choices \(3\)"),
        ({"layout": LAYOUT._replace(num_choices=0)}, "layout.num_choices must be at least 1, got 0"),
        ({"layout": LAYOUT._replace(offsets=LAYOUT.offsets.flip(0))}, "layout.offsets must ascend from 0"),
        ({"layout": LAYOUT._replace(slot_order=LAYOUT.slot_order + 1)}, "layout.slot_order must be a permutation"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"x": X, "weight": W, "layout": LAYOUT} | changes
    with pytest.raises(ValueError, match=f"grouped_gemm: {message}"):
        grouped_gemm(**arguments)


SMOKE = """
import torch
from routed import as_leaves, randn, random_layout
from moduleformer_ext import reference
from moduleformer_ext.ops import expert_ffn
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-12)):
    for tokens in (3, 50):
        layout = random_layout(tokens, 4, 2)
        gates = torch.rand(tokens, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        x, bias = randn(tokens, 37, dtype=dtype), randn(4, 58, dtype=dtype)
        up, down = randn(4, 37, 58, dtype=dtype, scale=0.2), randn(4, 29, 37, dtype=dtype, scale=0.2)
        for stored in (lambda w: w, lambda w: w.transpose(1, 2).contiguous().transpose(1, 2)):
            inputs = as_leaves(x, stored(up), stored(down), gates, bias)
            exact = as_leaves(*inputs, dtype=torch.float64)
            for function, (x_, u, d, g, b) in ((expert_ffn, inputs), (reference.expert_ffn, exact)):
                function(x_, u, d, layout, g, activation="geglu", up_bias=b).square().sum().backward()
            for a, b in zip(inputs, exact):
                assert (a.grad.double() - b.grad).abs().max() <= tolerance * b.grad.abs().max(), dtype
"""


@pytest.mark.parametrize(
    "environment",
    [{"MFX_CPU_ISA": isa} for isa in ("baseline", "avx2", "avx512")] + [{"MFX_BRGEMM": way} for way in ("0", "aten")],
    ids=str,
)
def test_other_instruction_sets(environment):
    run_with(environment, SMOKE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_features", [2048, 2040])
def test_large_gradients_of_the_matrices(dtype, out_features):
    """They are written past the caches, where whole lines allow it; an expert without rows still gets zeros."""
    experts, features = 5, 2**25 // (4 * 2040 * dtype.itemsize)
    layout = layout_of([[0], [2], [2], [4], [3]], experts)
    x, weight = as_leaves(randn(5, features, dtype=dtype), randn(experts, features, out_features, dtype=dtype))
    assert weight.nbytes >= 2**25
    grad = randn(5, out_features, dtype=dtype)
    (found,) = torch.autograd.grad(grouped_gemm(x, weight, layout), weight, grad)
    rows = torch.zeros(experts, 5, dtype=torch.float64)
    for position, slot in enumerate(layout.slot_order.tolist()):
        rows[[0, 2, 2, 4, 3][slot], position] = 1
    by_slot = x.detach().double()[layout.slot_order.long()]
    exact = torch.einsum("ep,pi,po->eio", rows, by_slot, grad.double())
    assert found[1].count_nonzero() == 0
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
