"""The primitives of csrc/core at every instruction set, against wider arithmetic or every possible input."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import mpmath  # with torch, through sympy
import numpy as np
import pytest
import torch

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
Array = np.ndarray


@pytest.fixture(params=ISAS)
def call(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Callable[..., None]:
    """call(stem, arguments...) at one instruction set: arrays become pointers, numbers 64-bit integers."""
    if not library.isa_usable(request.param.encode()):
        pytest.skip(f"{request.param} is not available here")
    return lambda stem, *arguments: _call(library, f"{stem}_{request.param}", *arguments)


def _call(library: ctypes.CDLL, name: str, *arguments: Array | int) -> None:
    getattr(library, name)(
        *(ctypes.c_int64(a) if isinstance(a, int) else a.ctypes.data_as(ctypes.c_void_p) for a in arguments)
    )


def apply(call: Callable[..., None], stem: str, x: Array, out_type: type | None = None) -> Array:
    out = np.empty(x.shape, out_type or x.dtype)
    call(stem, np.ascontiguousarray(x), out, x.size)
    return out


def ulps(got: Array, exact: Array) -> float:
    """Largest error in units of the last place of the exact value."""
    spacing = np.spacing(np.abs(exact).astype(got.dtype)).astype(exact.dtype)
    return float((np.abs(got.astype(exact.dtype) - exact) / spacing).max())


# exp


@pytest.mark.parametrize(
    ("dtype", "wide", "low", "high", "bound"),
    [(np.float32, np.float64, -87.0, 88.72283, 1.5), (np.float64, np.longdouble, -708.0, 709.782712893384, 2.5)],
)
def test_exp_over_its_range(call, dtype, wide, low, high, bound) -> None:
    x = np.concatenate([np.linspace(low, high, 400_001), np.linspace(-1, 1, 100_002)]).astype(dtype)
    assert ulps(apply(call, f"exp_{_suffix(dtype)}", x), np.exp(x.astype(wide))) < bound


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_beyond_its_range(call, dtype) -> None:
    x = np.array([-np.inf, -1e30, -710, 0, -0.0, 710, 1e30, np.inf, np.nan], dtype)
    expected = np.array([0, 0, 0, 1, 1, np.inf, np.inf, np.inf, np.nan], dtype)
    np.testing.assert_array_equal(apply(call, f"exp_{_suffix(dtype)}", x), expected)


def _suffix(dtype: type) -> str:
    return {np.float32: "f32", np.float64: "f64"}[dtype]


# gelu


def _normal_cdf(z: Array) -> Array:
    """With 30 digits before the result is rounded to a long double: the tail would cost a double some of its own."""
    with mpmath.workdps(30):
        return np.array([np.longdouble(str(mpmath.ncdf(v))) for v in z.tolist()])


@pytest.mark.parametrize(("dtype", "low"), [(np.float32, -12.0), (np.float64, -36.0)])
def test_gelu(call, dtype, low) -> None:
    z = np.linspace(low, 40, 2001).astype(dtype)
    exact = z * _normal_cdf(z)
    spacing = np.spacing(np.abs(exact).astype(dtype))
    # exp(-z^2 / 2) cannot be closer than its rounded exponent.
    bound = 8 + np.minimum(z, 0) ** 2 / 2
    assert (np.abs(apply(call, f"gelu_{_suffix(dtype)}", z) - exact) / spacing < bound).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gelu_slope(call, dtype) -> None:
    z = np.linspace(-14, 14, 2001).astype(dtype)
    exact = _normal_cdf(z) + z * np.exp(-(z.astype(np.longdouble) ** 2) / 2) / np.sqrt(2 * np.longdouble(np.pi))
    slope = apply(call, f"gelu_slope_{_suffix(dtype)}", z)
    np.testing.assert_allclose(slope.astype(np.longdouble), exact, rtol=0, atol=4 * np.finfo(dtype).eps)


# 16-bit formats


def _all_bits() -> Array:
    return np.arange(1 << 16, dtype=np.uint16)


def _widened(bits: Array, kind: str) -> Array:
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _assert_same(got: Array, expected: Array) -> None:
    """Bit for bit, the sign of zero too; NaN where NaN is expected."""
    np.testing.assert_array_equal(got, expected)
    number = expected == expected
    np.testing.assert_array_equal(np.signbit(got)[number], np.signbit(expected)[number])


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("stem", ["widen", "widen_pairs"])
def test_widening_every_16_bit_value(call, stem, kind) -> None:
    bits = _all_bits()
    _assert_same(apply(call, f"{stem}_{kind}", bits, np.float32), _widened(bits, kind))


def test_widening_every_byte(call) -> None:
    numbers = np.roll(np.arange(-128, 128, dtype=np.int8), 3)
    np.testing.assert_array_equal(apply(call, "widen_bytes", numbers, np.int32), numbers)
    odd = np.zeros(257, np.int8)[1:]
    odd[:] = numbers
    out = np.empty(256, np.int32)
    call("widen_bytes", odd, out, 256)
    np.testing.assert_array_equal(out, numbers)


def _between(kind: str) -> Array:
    """Every 16-bit value, the middle between it and its successor, and the floats next to that middle."""
    low = _widened(_all_bits(), kind)
    low = low[np.isfinite(low)]
    bits = low.view(np.uint32)
    if kind == "bf16":
        middle = (bits + 0x8000).view(np.float32)
    else:
        following = np.nextafter(low.astype(np.float16), np.copysign(np.float16(np.inf), low)).astype(np.float32)
        following = np.where(np.isinf(following), np.copysign(np.float32(65536), low), following)
        middle = (low + following) / 2
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    specials = np.concatenate([np.array([np.inf, -np.inf, 1e-45, -1e-45, 3e38], np.float32), nans])
    outward = np.copysign(np.float32(np.inf), middle)
    return np.concatenate([low, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, outward), specials])


def _narrowed(x: Array, kind: str) -> Array:
    return torch.from_numpy(x).to(torch.bfloat16 if kind == "bf16" else torch.float16).float().numpy()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_narrowing_around_every_16_bit_value(call, kind, request) -> None:
    x = _between(kind)
    got, expected = _widened(apply(call, f"narrow_{kind}", x, np.uint16), kind), _narrowed(x, kind)
    if kind == "bf16" and "avx512_bf16" in request.node.name:  # the instruction takes denormals for zero
        denormal = np.abs(x) < np.finfo(np.float32).tiny
        expected = np.where(denormal, np.copysign(np.float32(0), x), expected)
    _assert_same(got, expected)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_scalar_conversions(library, kind) -> None:
    bits, x = _all_bits(), _between(kind)
    wide, narrow = np.empty(bits.shape, np.float32), np.empty(x.shape, np.uint16)
    _call(library, f"widen_{kind}_scalar", bits, wide, bits.size)
    _call(library, f"narrow_{kind}_scalar", x, narrow, x.size)
    _assert_same(wide, _widened(bits, kind))
    _assert_same(_widened(narrow, kind), _narrowed(x, kind))


def test_interleaving_rows_of_bf16(call) -> None:
    even, odd = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)
    out = np.empty(128, np.uint32)
    call("interleave_bf16", even, odd, out, 128)
    pairs = out.view(np.uint16).reshape(128, 2)
    np.testing.assert_array_equal(_widened(pairs[:, 0], "bf16"), _narrowed(even, "bf16"))
    np.testing.assert_array_equal(_widened(pairs[:, 1], "bf16"), _narrowed(odd, "bf16"))


def test_reciprocal(call) -> None:
    """Over the range of 1 + exp(logit) in a stick scan, and exact where a stick is to stay whole."""
    x = np.concatenate([np.linspace(1, 2, 100_003), np.logspace(0, 34.9, 100_003)]).astype(np.float32)
    assert ulps(apply(call, "reciprocal_f32", x), 1 / x.astype(np.float64)) < 1
    powers = 2.0 ** np.arange(0, 112, dtype=np.float32)
    np.testing.assert_array_equal(apply(call, "reciprocal_f32", powers), 1 / powers)


# tile_gemm

SIZES = [(1, 1, 1), (7, 5, 3), (6, 64, 33), (13, 67, 17), (65, 130, 9), (5, 33, 0)]


def _operands(m: int, n: int, k: int, dtype: type) -> tuple[Array, Array, Array]:
    """A, B and C with rows longer than the matrices, NaN beyond them."""
    generator = np.random.default_rng([m, n, k])
    shapes, padding = ((m, k), (k, n), (m, n)), (3, 5, 7)
    operands = []
    for (rows, columns), extra in zip(shapes, padding, strict=True):
        whole = np.full((rows, columns + extra), np.nan, dtype)
        whole[:, :columns] = generator.standard_normal((rows, columns))
        operands.append(whole)
    return tuple(operands)


def _check_gemm(call, stem: str, m: int, n: int, k: int, dtype: type, accumulate: bool) -> None:
    a, b, c = _operands(m, n, k, dtype)
    exact = a[:, :k].astype(np.longdouble) @ b[:, :n].astype(np.longdouble)
    if accumulate:
        exact += c[:, :n]
    else:
        c[:, :n] = np.nan
    call(stem, m, n, k, a, a.shape[1], b, b.shape[1], c, c.shape[1], int(accumulate))
    bound = (k + 1) * np.finfo(dtype).eps * 8
    np.testing.assert_allclose(c[:, :n].astype(np.longdouble), exact, rtol=bound, atol=bound)
    assert np.isnan(c[:, n:]).all(), "written beyond the columns of C"


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_native_tile_gemm(call, m, n, k, dtype, accumulate) -> None:
    _check_gemm(call, f"tile_gemm_native_{_suffix(dtype)}", m, n, k, dtype, accumulate)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 1), (7, 48, 3), (13, 64, 17), (65, 32, 130)])
def test_tile_gemm(call, m, n, k, accumulate) -> None:
    _check_gemm(call, "tile_gemm_f32", m, n, k, np.float32, accumulate)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 16, 2), (7, 48, 6), (33, 64, 30), (65, 32, 130), (48, 64, 96), (64, 48, 16)]
)
def test_bf16_tile_gemm(call, library, m, n, k, accumulate) -> None:
    if not library.brgemm_usable_bf16():
        pytest.skip("this torch or processor multiplies no bf16 tiles")
    a, b, c = _operands(m, n, k, np.float32)
    a, b = (torch.from_numpy(operand).to(torch.bfloat16) for operand in (a, b))
    exact = a[:, :k].double().numpy() @ b[:, :n].double().numpy() + (c[:, :n] if accumulate else 0)
    vnni = b.unflatten(0, (k // 2, 2)).transpose(1, 2).contiguous()  # pairs of rows interleaved
    bits = [operand.view(torch.int16).numpy() for operand in (a, vnni)]
    call("tile_gemm_bf16", m, n, k, bits[0], a.shape[1], bits[1], b.shape[1], c, c.shape[1], int(accumulate))
    np.testing.assert_allclose(c[:, :n], exact, rtol=1e-5, atol=(k + 1) * 1e-6)
    assert np.isnan(c[:, n:]).all(), "written beyond the columns of C"
