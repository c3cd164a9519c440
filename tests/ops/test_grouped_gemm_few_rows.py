"""Decoding: every expert has a handful of rows, and its matrix is streamed in tasks instead of packed."""

from __future__ import annotations

import pytest
import torch
from routed import DTYPES, assert_as_accurate, gate_dtype, randn

from moduleformer_ext import reference
from moduleformer_ext.ops import expert_ffn, expert_layout, grouped_gemm


def both(op, *arguments, **options):
    """Results of an op: ours, plain PyTorch's, and plain PyTorch's in float64."""
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    exact_options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    plain = getattr(reference, op.__name__)
    return op(*arguments, **options), plain(*arguments, **options), plain(*exact, **exact_options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 16, 17])
@pytest.mark.parametrize(("n", "m"), [(1000, 520), (13, 1100), (700, 6), (3, 1)])
def test_rows_of_one_expert(rows, n, m, dtype):
    torch.manual_seed(rows)
    layout = expert_layout(torch.tensor([[1]] * rows + [[3]], dtype=torch.int32), 4)
    x, weight = randn(rows + 1, n, dtype=dtype), randn(4, n, m, dtype=dtype, scale=n**-0.5)
    ours, plain, exact = both(grouped_gemm, x, weight, layout, out_order="slot")
    assert_as_accurate("y", ours, plain, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_ffn_of_a_few_tokens(tokens, activation, dtype):
    torch.manual_seed(tokens)
    d, f, experts = 264, 700, 5
    columns = 2 * f if activation == "swiglu" else f
    layout = expert_layout(torch.rand(tokens, experts).argsort(1)[:, :2].int(), experts)
    x, gates = randn(tokens, d, dtype=dtype), torch.rand(tokens, 2, dtype=gate_dtype(dtype))
    up = randn(experts, d, columns, dtype=dtype, scale=d**-0.5)
    down = randn(experts, f, d, dtype=dtype, scale=f**-0.5)
    ours, plain, exact = both(expert_ffn, x, up, down, layout, gates, activation=activation)
    assert_as_accurate("y", ours, plain, exact, dtype)


def test_threads_and_repetition_change_no_bit(set_threads):
    x, weight = randn(6, 1500), randn(3, 1500, 900)
    layout = expert_layout(torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [1, 0], [0, 2]], dtype=torch.int32), 3)
    gates = torch.rand(6, 2)
    results = []
    for count in (1, 2, 3):
        set_threads(count)
        results += [grouped_gemm(x, weight, layout, out_order="token", gates=gates) for _ in range(10)]
    assert all(torch.equal(result, results[0]) for result in results)
