"""What concerns the CUDA kernels alone; values and gradients are compared in tests/ops."""

from __future__ import annotations

import pytest
import torch
from routed import grouped_values, layout_of, on, random_layout
from tf32_settings import SETTINGS, tf32

from moduleformer_ext import reference
from moduleformer_ext.ops import expert_ffn, grouped_gemm


def run_everything(device):
    generator = torch.Generator().manual_seed(6)

    def rand(*shape):
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_()

    layout = on(layout_of([[0, 1 + t % 3] for t in range(150)], 5), device)
    x, up, down, weight = rand(150, 72), rand(5, 72, 144), rand(5, 72, 72), rand(5, 72, 72)
    gates = torch.rand(150, 2, generator=generator).to(device).requires_grad_()
    y = expert_ffn(x, up, down, layout, gates, activation="swiglu")
    z = grouped_gemm(x, weight, layout, out_order="token", gates=gates)
    (y.float().sum() + z.float().square().sum()).backward()
    return [t.detach().cpu() for t in (y, z, x.grad, up.grad, down.grad, weight.grad, gates.grad)]


def test_same_bits_under_every_schedule(device, schedule):
    for ours, first in zip(run_everything(device), run_everything(device), strict=True):
        assert torch.equal(ours, first)


def test_more_segments_than_a_launch_takes(device):
    layout = on(random_layout(80, 66, 1), device)
    apart = torch.randn(66, 2, 8, 8).to(device)  # every other matrix: no two are neighbours
    with pytest.raises(ValueError, match=r"grouped_gemm: weight must lie in runs of matrices .* at most 64 .* got 65"):
        grouped_gemm(torch.randn(80, 8).to(device), [a[:1] for a in apart], layout)


@pytest.mark.parametrize("setting", SETTINGS)
def test_tf32_only_on_request(device, setting):
    torch.manual_seed(9)
    layout = random_layout(50, 3, 2)
    x, weight, _ = grouped_values(layout, "token", 256, 40, torch.float32)
    exact = reference.grouped_gemm(x.double(), weight.double(), layout)

    def error():
        out = grouped_gemm(x.to(device), weight.to(device), on(layout, device)).cpu()
        return (out - exact).abs().max().item() / exact.abs().max().item()

    assert error() < 1e-6
    with tf32(setting):
        assert 1e-5 < error() < 1e-3
    assert error() < 1e-6


def test_float64_raises(device):
    layout = on(random_layout(4, 3, 2), device)
    x, weight = torch.randn(4, 8).double().to(device), torch.randn(3, 8, 6).double().to(device)
    with pytest.raises(ValueError, match="grouped_gemm: x must be float32, bfloat16 or float16 for the CUDA kernels"):
        grouped_gemm(x, weight, layout)
    gates = torch.rand(4, 2).double().to(device)
    with pytest.raises(ValueError, match="expert_ffn: x must be float32, bfloat16 or float16 for the CUDA kernels"):
        expert_ffn(x, weight, weight.transpose(1, 2), layout, gates)
