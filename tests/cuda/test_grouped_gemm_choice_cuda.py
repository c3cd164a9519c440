"""Which kernels serve a grouped product on each architecture, in processes with an emulated device of it."""

import os
import subprocess
import sys

import pytest
from devices import EMULATED

from moduleformer_ext._extension import cuda_kernels

pytestmark = pytest.mark.skipif(not EMULATED, reason="needs the emulated device")
HAS_SM90A = any(arch == 90 for _, _, arch in cuda_kernels())

# Prints the products that were launched, a line per call; experts have slots / 2 rows each.
CODE = """
import cudasim, torch
from moduleformer_ext import reference
from moduleformer_ext.ops import grouped_gemm
for slots, features in (32, 16), (34, 16), (128, 16), (130, 16), (130, 15):
    layout = reference.expert_layout(torch.arange(slots)[:, None] % 2, 2)
    x = torch.randn(slots, features, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2, features, features, dtype=torch.bfloat16, requires_grad=True)
    cudasim.reset_stats()
    grouped_gemm(x, weight, layout).sum().backward()
    names = [launch["kernel"] for launch in cudasim.stats()]
    print(*(name.removeprefix("grouped_") for name in names if name.startswith("grouped_")))
"""


# What Hopper's kernels serve, and what they leave to sm_80's.
HOPPER = """
import cudasim, torch
from moduleformer_ext import reference
from moduleformer_ext.ops import expert_ffn, grouped_gemm
layout = reference.expert_layout(torch.arange(180)[:, None] % 9, 9)
x, apart = torch.randn(180, 16, dtype=torch.bfloat16), torch.randn(9, 2, 16, 16, dtype=torch.bfloat16)
weight = apart[:, 0].contiguous()
bias = torch.randn(9, 16, dtype=torch.bfloat16)
gates = torch.rand(180, 1)
for call in (
    lambda: grouped_gemm(x, weight, layout),
    lambda: grouped_gemm(x, weight.mT.contiguous().mT, layout, bias=bias, activation="swiglu"),
    lambda: grouped_gemm(x.half(), [w[:1] for w in apart.half()], layout),
    lambda: grouped_gemm(x.half(), weight.half().split([2, 3, 4]), layout),
    lambda: grouped_gemm(x.float(), weight.float(), layout),
    lambda: grouped_gemm(x, weight[:1].expand(9, 16, 16), layout),
    lambda: grouped_gemm(x, weight.new_ones(9 * 264).as_strided((9, 16, 16), (264, 16, 1)), layout),
    lambda: grouped_gemm(x, weight.new_ones(9 * 272).as_strided((9, 16, 16), (272, 16, 1)), layout),
):
    cudasim.reset_stats()
    call()
    print(*(launch["kernel"].removeprefix("grouped_") for launch in cudasim.stats()))
"""


def run(arch, code=CODE):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CUDASIM_ARCH": arch},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


UNALIGNED = [f"{product}_bf16_64x128_unaligned_sm80" for product in ("forward", "input_grad", "weight_grad")]


@pytest.mark.parametrize("arch", ["80", "86", "89", "90", "100"])
def test_height_of_tiles_and_alignment(arch):
    done = run(arch)
    assert done.returncode == 0, done.stderr
    launched = [sorted(line.split()) for line in done.stdout.splitlines()]
    weight_grad = "weight_grad_bf16_128x128_sm80"
    if arch == "90" and HAS_SM90A:
        hopper = [f"{product}_bf16_128x128_sm90a" for product in ("forward", "input_grad", "weight_grad")]
        assert launched == [["forward_bf16_16x32_sm80", *hopper[1:]], hopper, hopper, hopper, UNALIGNED]
        return
    assert launched == [
        ["forward_bf16_16x32_sm80", "input_grad_bf16_64x128_sm80", weight_grad],
        ["forward_bf16_64x128_sm80", "input_grad_bf16_64x128_sm80", weight_grad],
        ["forward_bf16_64x128_sm80", "input_grad_bf16_64x128_sm80", weight_grad],
        ["forward_bf16_128x128_sm80", "input_grad_bf16_128x128_sm80", weight_grad],
        UNALIGNED,
    ]


@pytest.mark.skipif(not HAS_SM90A, reason="this build has no kernels of sm_90a")
def test_what_hopper_serves():
    done = run("90", HOPPER)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "forward_bf16_128x128_sm90a",
        "forward_transposed_bf16_128x128_sm90a",
        "forward_f16_64x128_sm80",  # more segments than maps
        "forward_f16_128x128_sm90a",
        "forward_f32_64x128_sm80",
        "forward_bf16_64x128_sm80",  # matrices at no distance
        "forward_bf16_64x128_sm80",  # at a distance that is no whole number of rows
        "forward_bf16_128x128_sm90a",
    ]


def test_no_kernels_before_sm_80():
    done = run("75")
    assert done.returncode != 0
    assert (
        "ValueError: grouped_gemm: x must lie on a GPU of compute capability 8.0 or newer for the CUDA kernels, got 7.5"
        in done.stderr
    )
