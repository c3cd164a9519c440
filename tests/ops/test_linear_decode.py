import pytest
import torch

from moduleformer_ext import reference
from moduleformer_ext.nn import Linear
from moduleformer_ext.ops import linear_decode

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Half a unit of the last place where results are rounded, else accumulated rounding.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def inputs(*leading, size=70, out=37, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (*leading, size), (out, size), (out,)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9])
@pytest.mark.parametrize(("size", "out"), [(1, 1), (7, 3), (64, 4), (70, 37), (1024, 130)])
def test_against_the_oracle(dtype, rows, size, out):
    x, weight, bias = inputs(rows, size=size, out=out, dtype=dtype)
    for b in (None, bias):
        y = linear_decode(x, weight, b)
        expected = reference.linear_decode(*(t if t is None else t.double() for t in (x, weight, b)))
        assert y.dtype == dtype
        assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_twin_agrees(dtype):
    x, weight, bias = inputs(2, 1, dtype=dtype)
    torch.testing.assert_close(linear_decode(x, weight, bias), reference.linear_decode(x, weight, bias))


def test_shapes_and_strides():
    x, weight, bias = inputs(2, 3)
    expected = linear_decode(x, weight, bias)
    assert expected.shape == (2, 3, 37)
    assert torch.equal(linear_decode(x.transpose(0, 1), weight, bias).transpose(0, 1), expected)
    assert torch.equal(linear_decode(x[0, 0], weight, bias), expected[0, 0])
    strided = torch.stack([bias, -bias], dim=1)[:, 0]
    assert torch.equal(linear_decode(x, weight, strided), expected)


def test_empty():
    x, weight, bias = inputs(0, 1)
    assert linear_decode(x, weight, bias).shape == (0, 1, 37)
    x, weight, bias = inputs(2, out=0)
    assert linear_decode(x, weight, bias).shape == (2, 0)
    x, weight, bias = inputs(2, size=0)
    assert torch.equal(linear_decode(x, weight, bias), bias.expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_rows_nor_threads_show_in_the_bits(dtype, set_threads):
    x, weight, bias = inputs(8, size=300, out=1000, dtype=dtype)
    together = linear_decode(x, weight, bias)
    assert torch.equal(torch.stack([linear_decode(row, weight, bias) for row in x]), together)
    for count in (1, 2, 3):
        set_threads(count)
        assert torch.equal(linear_decode(x, weight, bias), together)


def test_extreme_values():
    x, weight, bias = inputs(2)
    x[0, 3], weight[5, 1] = torch.inf, torch.nan
    y, expected = linear_decode(x, weight, bias), reference.linear_decode(x, weight, bias)
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_compiled_and_traced():
    x, weight, bias = inputs(2)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.moduleformer_ext.linear_decode.default, (x, weight, bias))
        torch.library.opcheck(torch.ops.moduleformer_ext.linear_decode.default, (x, weight))
        compiled = torch.compile(linear_decode, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, weight, bias), linear_decode(x, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(())}, r"x must be \[\.\.\., in\], got shape \[\]"),
        ({"x": torch.ones(2, 70, dtype=torch.int32)}, "x must be float32, float64, bfloat16 or float16, got Int"),
        ({"x": torch.ones(2, 70, device="meta")}, "weight must be on the device of x"),
        ({"weight": torch.ones(37)}, r"weight must have 2 dimensions, got shape \[37\]"),
        ({"weight": torch.ones(37, 71)}, r"weight must be \[out, in\] with in = 70.*got shape \[37, 71\]"),
        ({"weight": torch.ones(37, 70).bfloat16()}, r"weight must have the dtype of x \(Float\), got BFloat16"),
        ({"weight": torch.ones(70, 37).t()}, r"weight must be contiguous, got strides \[1, 37\]"),
        ({"bias": torch.ones(36)}, r"bias must be \[out\] with out = 37, got shape \[36\]"),
        ({"bias": torch.ones(37).half()}, r"bias must have the dtype of x \(Float\), got Half"),
        ({"x": torch.ones(2, 70, requires_grad=True)}, "x must not require grad: this op has no backward"),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(("x", "weight", "bias"), inputs(2), strict=True)) | change
    with pytest.raises(ValueError, match=f"linear_decode: {message}"):
        linear_decode(**arguments)


def test_the_layer_decodes_without_gradients_and_trains_with_them(monkeypatch):
    layer, calls = Linear(70, 37), []
    monkeypatch.setattr("moduleformer_ext.ops.linear_decode", lambda *a: calls.append(a) or linear_decode(*a))
    few, many = torch.randn(1, 8, 70), torch.randn(3, 3, 70)
    plain = torch.nn.functional.linear
    torch.testing.assert_close(layer(few), plain(few, layer.weight, layer.bias))
    assert layer(few).requires_grad and not calls
    with torch.no_grad():
        torch.testing.assert_close(layer(few), plain(few, layer.weight, layer.bias))
        assert len(calls) == 1
        torch.testing.assert_close(layer(many), plain(many, layer.weight, layer.bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(few).dtype == torch.bfloat16
        assert len(calls) == 1
