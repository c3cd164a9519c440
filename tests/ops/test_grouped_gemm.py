from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from routed import (
    DTYPES,
    as_leaves,
    assert_as_accurate,
    gate_dtype,
    gradients,
    layout_of,
    randn,
    random_layout,
    rows_shape,
)

from moduleformer_ext import reference
from moduleformer_ext._extension import build_info
from moduleformer_ext.ops import expert_layout, grouped_gemm
from moduleformer_ext.reference.grouped_gemm import ACTIVATIONS

ORDERS = ("token", "slot", "expert")


def check(layout, x, weight, gates, **options):
    """Output and every gradient against float64 and against plain PyTorch in the same dtype."""
    inputs = as_leaves(x, weight, gates)
    plain = as_leaves(x, weight, gates)
    exact = as_leaves(x, weight, gates, dtype=torch.float64)
    results = []
    for function, (a, w, g) in (
        (grouped_gemm, inputs),
        (reference.grouped_gemm, plain),
        (reference.grouped_gemm, exact),
    ):
        out = function(a, w, layout, gates=g, **options)
        if not results:
            grad = randn(*out.shape, dtype=x.dtype)
        results.append([out, *gradients(out, [a, w, g], grad)])
    for name, ours, theirs, truth in zip(("y", "dx", "dweight", "dgates"), *results, strict=False):
        assert_as_accurate(name, ours, theirs, truth, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x_order", "out_order"), list(itertools.product(ORDERS, ORDERS)))
def test_orders(x_order, out_order, dtype):
    torch.manual_seed(0)
    for tokens, experts, choices, n, m in ((37, 5, 2, 24, 40), (11, 4, 3, 17, 33), (150, 2, 1, 70, 130)):
        layout = random_layout(tokens, experts, choices)
        x = randn(*rows_shape(x_order, layout, n), dtype=dtype)
        weight = randn(experts, n, m, dtype=dtype, scale=n**-0.5)
        gates = torch.rand(tokens, choices, dtype=gate_dtype(dtype)) if out_order == "token" else None
        check(layout, x, weight, gates, x_order=x_order, out_order=out_order)
        if gates is not None:
            check(layout, x, weight, None, x_order=x_order, out_order=out_order)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    torch.manual_seed(1)
    layout = random_layout(29, 6, 2)
    x, weight = randn(29, 20, dtype=dtype, scale=2), randn(6, 20, 2 * 35, dtype=dtype, scale=20**-0.5)
    check(layout, x, weight, None, activation=activation)
    check(layout, x, weight, torch.rand(29, 2, dtype=gate_dtype(dtype)), out_order="token", activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_beyond_one_panel_of_depth(dtype):
    torch.manual_seed(2)
    layout = random_layout(20, 3, 2)
    check(layout, randn(20, 2100, dtype=dtype), randn(3, 2100, 66, dtype=dtype, scale=0.02), None, activation="swiglu")
    check(layout, randn(20, 66, dtype=dtype), randn(3, 66, 2101, dtype=dtype, scale=0.1), None, out_order="token")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_takes_all_and_the_others_get_zero_gradients(dtype):
    torch.manual_seed(3)
    layout = layout_of([[2]] * 700, 4)
    x, weight = randn(700, 33, dtype=dtype), randn(4, 33, 65, dtype=dtype, scale=0.2)
    check(layout, x, weight, None)
    (leaf,) = as_leaves(weight)
    grouped_gemm(x, leaf, layout).sum().backward()
    assert (leaf.grad[[0, 1, 3]] == 0).all()
    assert (leaf.grad[2] != 0).any()


def test_every_expert_is_chosen():
    torch.manual_seed(4)
    layout = random_layout(9, 4, 4)
    check(layout, randn(9, 12), randn(4, 12, 20), torch.rand(9, 4), out_order="token")


@pytest.mark.parametrize("x_order", ORDERS)
@pytest.mark.parametrize("out_order", ORDERS)
def test_no_tokens(x_order, out_order):
    layout = random_layout(0, 3, 2)
    x = torch.zeros(rows_shape(x_order, layout, 8), requires_grad=True)
    weight = torch.randn(3, 8, 6, requires_grad=True)
    out = grouped_gemm(x, weight, layout, x_order=x_order, out_order=out_order, activation="silu")
    assert out.shape == rows_shape(out_order, layout, 6)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_equal_one_tensor(dtype):
    torch.manual_seed(6)
    layout = random_layout(40, 6, 2)
    x, weight = randn(40, 16, dtype=dtype), randn(6, 16, 24, dtype=dtype)
    whole = as_leaves(x, weight)
    parts = as_leaves(x, weight[:1], weight[1:1], weight[1:4], weight[4:])
    out = grouped_gemm(whole[0], whole[1], layout, activation="gelu")
    split = grouped_gemm(parts[0], tuple(parts[1:]), layout, activation="gelu")
    assert torch.equal(out, split)
    grad = torch.randn_like(out)
    out.backward(grad)
    split.backward(grad)
    assert torch.equal(whole[0].grad, parts[0].grad)
    assert torch.equal(whole[1].grad, torch.cat([p.grad for p in parts[1:]]))


def test_gradients_only_where_required():
    layout = random_layout(12, 4, 2)
    x, frozen = torch.randn(12, 8), torch.randn(3, 8, 6)
    new = torch.randn(1, 8, 6, requires_grad=True)
    out = grouped_gemm(x, (frozen, new), layout, out_order="token", gates=torch.rand(12, 2))
    out.sum().backward()
    assert new.grad is not None
    assert frozen.grad is None
    assert x.grad is None
    with torch.no_grad():
        assert not grouped_gemm(x, new.expand(4, 8, 6), layout).requires_grad

    op = torch.ops.moduleformer_ext.grouped_gemm_backward
    arguments = op_arguments(layout, x, [frozen, new], "expert")
    grads = op(torch.randn(24, 6), *arguments, x.new_empty(0), False, False, [False, True])
    assert [g.numel() for g in grads] == [0, 0, 0, new.numel()]


def test_strides_need_no_contiguity():
    torch.manual_seed(7)
    layout = random_layout(10, 3, 2)
    weight = torch.randn(3, 5, 8).transpose(1, 2)
    slots = torch.randn(2, 10, 8).transpose(0, 1)
    assert torch.equal(
        grouped_gemm(slots, weight, layout, x_order="slot", out_order="slot"),
        grouped_gemm(slots.contiguous(), weight.contiguous(), layout, x_order="slot", out_order="slot"),
    )
    wide = torch.randn(10, 20)
    for x in (wide[:, 3:11], wide.t()[:8, :].t()[:, :8], torch.randn(8, 10).t()):
        leaf = x.detach().requires_grad_()
        out = grouped_gemm(leaf, weight, layout)
        assert torch.equal(out, grouped_gemm(x.contiguous(), weight, layout))
        out.sum().backward()  # an expanded gradient
        plain = x.detach().clone().requires_grad_()
        reference.grouped_gemm(plain, weight, layout).sum().backward()
        torch.testing.assert_close(leaf.grad, plain.grad)


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
def test_repeats_bitwise_for_any_number_of_threads(dtype):
    layout = layout_of([[0, 1 + t % 3] for t in range(300)], 5)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            runs.append(run_everything(layout, dtype))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_every_element_is_written():
    """Fresh memory is filled with NaN under deterministic algorithms."""
    layout = layout_of([[0, 3], [3, 0], [0, 3]], 5)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        x = torch.randn(3, 7, requires_grad=True)
        weight = torch.randn(5, 7, 66, requires_grad=True)
        gates = torch.rand(3, 2, requires_grad=True)
        for out_order, activation in itertools.product(ORDERS, (None, "gelu", "reglu")):
            g = gates if out_order == "token" else None
            out = grouped_gemm(x, weight, layout, out_order=out_order, gates=g, activation=activation)
            results = [out, *gradients(out, [x, weight, g], torch.ones_like(out))]
            assert all(r.isfinite().all() for r in results)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite_stays_alone(dtype):
    layout = layout_of([[t % 3] for t in range(31)], 3)
    x, weight = randn(31, 9, dtype=dtype), randn(3, 9, 21, dtype=dtype)
    x[4] = torch.inf
    weight[2, 0, 0] = torch.nan
    out = grouped_gemm(x, weight, layout, out_order="slot").reshape(31, 21)
    clean = torch.ones(31, 21, dtype=torch.bool)
    clean[4], clean[2::3, 0] = False, False
    assert out[clean].isfinite().all()
    assert not out[~clean].isfinite().any()


def test_autocast_lowers_rows_and_matrices_but_not_gates():
    layout = random_layout(20, 4, 2)
    x, weight, gates = as_leaves(torch.randn(20, 16), torch.randn(4, 16, 8), torch.rand(20, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_gemm(x, weight, layout, out_order="token", gates=gates)
    assert torch.equal(out, grouped_gemm(x.bfloat16(), weight.bfloat16(), layout, out_order="token", gates=gates))
    out.sum().backward()
    assert {t.grad.dtype for t in (x, weight, gates)} == {torch.float32}


def op_arguments(layout, x, weights, out_order="token", gates=None, activation=None):
    tensors = (layout.offsets, layout.slot_order, layout.position, layout.num_choices)
    return (x, weights, *tensors, "token", out_order, gates, activation)


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
        return (x, [weight], layout[1], layout[2], layout[3], 2, "token", "token", gates, "geglu")

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


def test_exports():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 8, 5))

        def forward(self, x, ids):
            return grouped_gemm(x, self.weight, expert_layout(ids, 3), out_order="slot", activation="relu")

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
    layout = random_layout(50, 4, 2)
    gates = torch.rand(50, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    inputs = as_leaves(randn(50, 37, dtype=dtype), randn(4, 37, 58, dtype=dtype, scale=0.2),
                       randn(4, 29, 37, dtype=dtype, scale=0.2), gates)
    exact = as_leaves(*inputs, dtype=torch.float64)
    for function, (x, up, down, g) in ((expert_ffn, inputs), (reference.expert_ffn, exact)):
        function(x, up, down, layout, g, activation="geglu").square().sum().backward()
    for a, b in zip(inputs, exact):
        assert (a.grad.double() - b.grad).abs().max() <= tolerance * b.grad.abs().max(), dtype
"""


@pytest.mark.parametrize(
    "environment",
    [{"MFX_CPU_ISA": isa} for isa in ("baseline", "avx2", "avx512")] + [{"MFX_BRGEMM": way} for way in ("0", "aten")],
    ids=str,
)
def test_other_instruction_sets(environment):
    names = ["baseline", "avx2", "avx512", "avx512_bf16"]
    info, isa = build_info(), environment.get("MFX_CPU_ISA", "baseline")
    if isa not in str(info["cpu_isas"]).split() or names.index(isa) > names.index(str(info["cpu_isa"])):
        pytest.skip(f"{isa} is not available here")
    paths = os.pathsep.join((os.path.dirname(__file__), *sys.path))
    result = subprocess.run(
        [sys.executable, "-c", SMOKE],
        env=os.environ | environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


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
