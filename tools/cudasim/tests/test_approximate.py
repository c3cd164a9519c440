"""Errors of approximate instructions, when asked for: within what is documented, near it, and repeatable."""

import numpy as np
import pytest
from test_instructions import N, run

import cudasim


@pytest.fixture
def errors():
    before = cudasim.set_approx_error(True)
    yield
    cudasim.set_approx_error(before)
    cudasim.set_seed(0)


def results(instruction, x):
    return run(f"{instruction} %d, %s0;", "f32", ["f32"], x).view(np.float32)


def ulp(y):
    return np.exp2(np.floor(np.log2(np.abs(y))) - 23)


CASES = {
    "ex2.approx.ftz.f32": (np.exp2, (-20, 20), lambda y: 2 * ulp(y)),
    "rcp.approx.ftz.f32": (lambda x: 1 / x, (0.1, 20), ulp),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), (0.1, 20), lambda y: y * 2**-22.9),
    "sqrt.approx.f32": (np.sqrt, (0.1, 20), lambda y: y * 2.0**-23),
    "lg2.approx.f32": (np.log2, (2.5, 20), lambda y: 2 * ulp(y)),
    "tanh.approx.f32": (np.tanh, (0.1, 2), lambda y: y * 2.0**-11),
    "sin.approx.f32": (np.sin, (-3, 3), lambda y: np.full_like(y, 2**-21.41)),
}


@pytest.mark.parametrize("instruction", CASES)
def test_errors_fill_the_documented_bound(instruction, errors):
    function, (low, high), bound = CASES[instruction]
    x = np.random.default_rng(0).uniform(low, high, N).astype(np.float32)
    exact = function(x.astype(np.float64))
    first = results(instruction, x)
    share = np.abs(first - exact) / bound(exact)
    assert share.max() <= 1.0 + 1e-6
    assert share.max() > 0.8
    assert np.array_equal(first, results(instruction, x))
    cudasim.set_seed(5)
    assert not np.array_equal(first, results(instruction, x))
    cudasim.set_approx_error(False)
    plain = np.abs(results(instruction, x) - exact) / ulp(exact)
    assert plain.max() <= 0.5001 if instruction.startswith(("rcp", "sqrt")) else plain.max() < 2.5


def test_special_values_are_exact(errors):
    x = np.resize(np.array([0, -0.0, np.inf, -np.inf, np.nan], np.float32), N)
    for instruction, expected in (
        ("ex2.approx.ftz.f32", [1, 1, np.inf, 0, np.nan]),
        ("rcp.approx.ftz.f32", [np.inf, -np.inf, 0, -0.0, np.nan]),
        ("tanh.approx.f32", [0, -0.0, 1, -1, np.nan]),
    ):
        assert np.array_equal(results(instruction, x)[:5], np.array(expected, np.float32), equal_nan=True)


def test_division(errors):
    rng = np.random.default_rng(1)
    a, b = (rng.uniform(0.5, 8, N).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) / b
    for kind in ("approx", "full"):
        y = run(f"div.{kind}.f32 %d, %s0, %s1;", "f32", ["f32", "f32"], a, b).view(np.float32)
        share = np.abs(y - exact) / (2 * ulp(exact))
        assert 0.8 < share.max() <= 1.0 + 1e-6
    y = run("div.rn.f32 %d, %s0, %s1;", "f32", ["f32", "f32"], a, b).view(np.float32)
    assert np.array_equal(y, a / b)
