"""The CPU's product of routed rows with quantised matrices; tests/cuda has the tests of the CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import run_with
from routed import assert_as_accurate, layout_of, randn, random_layout, rows_shape

from moduleformer_ext import reference
from moduleformer_ext.ops import quantised_gemm
from moduleformer_ext.quantised import BITS, dequantise, quantise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x, matrices, layout, bits, **options):
    """Against the dequantised matrices in float64, beside plain PyTorch with matrices rounded to x's dtype."""
    weight = quantise(matrices, bits)
    wide = dequantise(weight)
    exact_options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    y = quantised_gemm(x, weight, layout, **options)
    plain = reference.grouped_gemm(x, wide.to(x.dtype), layout, **options)
    exact = reference.grouped_gemm(x.double(), wide.double(), layout, **exact_options)
    assert_as_accurate("y", y, plain, exact, x.dtype)
    twin = reference.quantised_gemm(x, weight, layout, **options)
    assert_as_accurate("twin", twin, plain, exact, x.dtype)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 70, 300])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (70, 130), (256, 64), (545, 200)])
def test_rows_of_one_expert(rows, n, m, bits, dtype):
    torch.manual_seed(rows)
    layout = layout_of([[1]] * rows + [[3]], 4)
    check(randn(rows + 1, n, dtype=dtype), randn(4, n, m, scale=n**-0.5), layout, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [3, 60])
@pytest.mark.parametrize("x_order", ["token", "slot", "expert"])
@pytest.mark.parametrize("out_order", ["token", "slot", "expert"])
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "swiglu"])
def test_every_order(activation, out_order, x_order, tokens, bits):
    torch.manual_seed(tokens)
    layout = random_layout(tokens, 3, 2)
    gates = torch.rand(tokens, 2) if out_order == "token" else None
    options = {"x_order": x_order, "out_order": out_order, "gates": gates, "activation": activation}
    check(randn(*rows_shape(x_order, layout, 48)), randn(3, 48, 256, scale=0.1), layout, bits, **options)


@pytest.mark.parametrize("bits", BITS)
def test_no_tokens_and_strides(bits):
    nothing = reference.expert_layout(torch.empty(0, 2, dtype=torch.int32), 2)
    assert quantised_gemm(torch.empty(0, 40), quantise(randn(2, 40, 50), bits), nothing).shape == (0, 50)
    layout, matrices = random_layout(5, 3, 2), randn(3, 40, 50)
    x = randn(5, 40)
    expected = check(x, matrices, layout, bits)
    for other in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, :40], x[:, None].expand(5, 2, 40)[:, 1]):
        assert torch.equal(quantised_gemm(other, quantise(matrices, bits), layout), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [4, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_repetition_change_no_bit(dtype, tokens, bits, set_threads, new_memory_is_nan):
    layout, weight = random_layout(tokens, 3, 2), quantise(randn(3, 300, 200, scale=0.1), bits)
    x, gates = randn(tokens, 300, dtype=dtype), torch.rand(tokens, 2)
    results = []
    for count in (1, 2, 3):
        set_threads(count)
        results += [quantised_gemm(x, weight, layout, out_order="token", gates=gates) for _ in range(3)]
    assert results[0].isfinite().all()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [3, 40])
def test_what_is_not_finite_stays_in_its_row(rows, bits):
    x, layout = randn(rows, 70), layout_of([[0]] * rows, 1)
    weight = quantise(randn(1, 70, 130), bits)
    expected = quantised_gemm(x, weight, layout)
    x[1, 5] = torch.nan
    y = quantised_gemm(x, weight, layout)
    assert y[1].isnan().all()
    others = [row for row in range(rows) if row != 1]
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_rows_far_from_zero(rows, bits, dtype):
    """Their numbers cancel, and nothing larger may appear in between."""
    torch.manual_seed(rows)
    x = (300 + torch.randn(rows, 512)).to(dtype)
    check(x, randn(1, 512, 130, scale=0.05), layout_of([[0]] * rows, 1), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype, bits):
    x, weight = randn(7, 70, dtype=dtype), quantise(randn(1, 70, 130), bits)
    y = quantised_gemm(x, weight, layout_of([[0]] * 7, 1))
    for row in range(7):
        assert torch.equal(quantised_gemm(x[row : row + 1], weight, layout_of([[0]], 1)), y[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 2.0**-12, 0.0])
def test_values_of_many_sizes_in_one_group(scale, dtype):
    """What is taken for x beside 4 bits is off by 2^-13 of a group's largest value at most."""
    torch.manual_seed(0)
    x = (torch.randn(3, 64) * 2.0 ** -torch.randint(0, 12, (3, 64)) * scale).to(dtype)
    weight = quantise(randn(1, 64, 130), 4)
    wide = dequantise(weight)[0].double()
    y = quantised_gemm(x, weight, layout_of([[0]] * 3, 1)).double()
    largest = x.double().abs().unflatten(1, (2, 32)).amax(-1).repeat_interleave(32, 1)
    allowed = (largest * 2.0**-13) @ wide.abs()
    expected = x.double() @ wide
    rounding = torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).smallest_normal * 2.0**-7
    assert ((y - expected).abs() <= allowed + rounding).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_smallest_and_the_largest_values(dtype):
    info = torch.finfo(dtype)
    weight = quantise(torch.ones(1, 32, 64), 4)
    for value in (
        info.max / 64,
        -info.max / 64,
        info.smallest_normal,
        2.0**-24 if dtype == torch.float16 else 2.0**-126,
    ):
        x = torch.zeros(1, 32, dtype=dtype)
        x[0, 3] = value
        y = quantised_gemm(x, weight, layout_of([[0]], 1))
        torch.testing.assert_close(y, torch.full((1, 64), value).to(dtype), rtol=0.02, atol=0)


def test_compiled_traced_and_under_autocast():
    layout, weight = random_layout(5, 3, 2), quantise(randn(3, 40, 50), 4)
    x = randn(5, 40)
    with torch.no_grad():
        operator = torch.ops.moduleformer_ext.quantised_gemm.default
        torch.library.opcheck(operator, (x, *weight, *layout[1:], "token", "slot", None, "relu"))
        compiled = torch.compile(quantised_gemm, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight, layout), quantised_gemm(x, weight, layout))
        with torch.autocast("cpu", torch.bfloat16):
            cast = quantised_gemm(x, weight, layout)
        assert torch.equal(cast, quantised_gemm(x.bfloat16(), weight, layout))


SMOKE = """
import torch
import test_quantised_gemm as tests
for dtype in tests.DTYPES:
    for bits in tests.BITS:
        for rows in (1, 2, 3, 7, 17, 70):
            tests.test_rows_of_one_expert(rows, 545, 200, bits, dtype)
        for tokens in (3, 60):
            tests.test_every_order("swiglu", "token", "slot", tokens, bits)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("brgemm", ["", "0"])
def test_other_instruction_sets(isa, brgemm):
    run_with({"MFX_CPU_ISA": isa} | ({"MFX_BRGEMM": brgemm} if brgemm else {}), SMOKE)


WEIGHT = quantise(torch.ones(3, 40, 50), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(5, 40).double()}, "x must be float32, bfloat16 or float16, got Double"),
        ({"x": torch.ones(5, 41)}, r"x must have as many features as weight has rows \(40\), got 41"),
        ({"x": torch.ones(5, 40, requires_grad=True)}, "x must not require grad"),
        ({"weight": WEIGHT._replace(bits=5)}, "weight.bits must be 8 or 4, got 5"),
        ({"weight": WEIGHT._replace(bits=8)}, r"weight.values must have shape \[3, 1, 40, 64\]"),
        ({"weight": WEIGHT._replace(out_features=65)}, r"weight.values must have shape \[3, 2, 32, 64\]"),
        ({"weight": WEIGHT._replace(out_features=0)}, r"weight.out_features must be in \[1, 1099511627776\], got 0"),
        ({"weight": WEIGHT._replace(out_features=2**63 - 1)}, "weight.out_features must be in "),
        ({"weight": WEIGHT._replace(in_features=-1)}, r"weight.in_features must be in \[1, 1099511627776\], got -1"),
        ({"weight": WEIGHT._replace(values=WEIGHT.values[:2])}, r"weight.values must have shape \[3, 1, 32, 64\]"),
        ({"weight": WEIGHT._replace(values=WEIGHT.values.int())}, "weight.values must be Char, got Int"),
        (
            {"weight": WEIGHT._replace(values=WEIGHT.values.transpose(2, 3).contiguous().transpose(2, 3))},
            "weight.values must be cont",
        ),
        ({"weight": WEIGHT._replace(scales=WEIGHT.scales.float())}, "weight.scales must be Half, got Float"),
        ({"weight": WEIGHT._replace(scales=WEIGHT.scales.clone().requires_grad_())}, "weight.scales must not require"),
        ({"gates": torch.ones(5, 2)}, "out_order must be 'token' where gates are given, got 'expert'"),
        ({"activation": "swiglu"}, "weight.out_features must be a multiple of 128 for a gated activation, got 50"),
        ({"activation": "tanh"}, "activation must be one of 'gelu_tanh'"),
        ({"x_order": "row"}, "x_order must be 'token', 'slot' or 'expert', got 'row'"),
    ],
)
def test_errors(change, message):
    arguments = {"x": torch.ones(5, 40), "weight": WEIGHT, "layout": random_layout(5, 3, 2)} | change
    with pytest.raises(ValueError, match=f"^quantised_gemm: {message}"):
        quantised_gemm(**arguments)


def test_a_layout_that_is_none_is_refused():
    layout = random_layout(5, 3, 2)
    broken = layout._replace(slot_order=torch.full_like(layout.slot_order, 1 << 30))
    with pytest.raises(ValueError, match=r"^quantised_gemm: layout\.slot_order must be a permutation"):
        quantised_gemm(torch.ones(5, 40), WEIGHT, broken)
