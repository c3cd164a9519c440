"""Rows and columns of grouped_gemm that are not what vector loads need; matrices are in test_expert_weights.py."""

from __future__ import annotations

import pytest
import torch
from routed import DTYPES, assert_as_accurate, gate_dtype, grouped_values, on, random_layout
from strides import spaced

from moduleformer_ext import reference
from moduleformer_ext.ops import grouped_gemm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("x_order", "dim"), [("token", 0), ("slot", 0), ("slot", 1), ("expert", 0)])
def test_rows_at_odd_distances(x_order, dim, dtype, device):
    torch.manual_seed(12)
    layout = on(random_layout(33, 5, 2), device)
    x, weight, _ = grouped_values(layout, x_order, 24, 40, dtype)
    x, weight = x.to(device), weight.to(device)
    expected, out = (grouped_gemm(rows, weight, layout, x_order=x_order) for rows in (x, spaced(x, dim)))
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 3e-6
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_behind_short_rows_of_x_reaches_no_gate(dtype, device):
    """Rows of 13 elements, 16 apart: all begin at multiples of 16 bytes, none ends there."""
    torch.manual_seed(13)
    layout = on(random_layout(33, 5, 2), device)
    x, weight, gates = (t.to(device) for t in grouped_values(layout, "token", 13, 16, dtype, True))
    results = []
    for rows in (x, spaced(x, 0, gap=3)):
        gates = gates.detach().requires_grad_()
        grouped_gemm(rows, weight, layout, out_order="token", gates=gates).float().square().sum().backward()
        results.append(gates.grad)
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [4, 12, 20])
def test_halves_of_gated_matrices_that_are_no_multiple_of_16_bytes(columns, dtype, device):
    """Nothing is saved for backward and a token's choices are summed in float32: only the matrices' halves tell."""
    torch.manual_seed(14)
    layout = random_layout(33, 5, 2)
    x, weight, gates = grouped_values(layout, "token", 16, 2 * columns, dtype, True)
    given = (x.to(device), weight.to(device), on(layout, device))
    out = grouped_gemm(*given, out_order="token", gates=gates.to(device), activation="swiglu")
    options = {"out_order": "token", "activation": "swiglu"}
    same, exact = (
        reference.grouped_gemm(*(t.to(d) for t in (x, weight)), layout, gates=gates.to(gate_dtype(d)), **options)
        for d in (dtype, torch.float64)
    )
    assert_as_accurate("out", out.cpu(), same, exact, dtype)
