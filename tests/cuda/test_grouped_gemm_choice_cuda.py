"""Which kernels serve a grouped product on each architecture, in processes with an emulated device of it."""

import os
import subprocess
import sys

import pytest
from devices import EMULATED

pytestmark = pytest.mark.skipif(not EMULATED, reason="needs the emulated device")

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


def run(arch):
    return subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"CUDASIM_ARCH": arch},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("arch", ["80", "86", "89", "90"])
def test_height_of_tiles_and_alignment(arch):
    done = run(arch)
    assert done.returncode == 0, done.stderr
    weight_grad = "weight_grad_bf16_128x128_sm80"
    assert [sorted(line.split()) for line in done.stdout.splitlines()] == [
        ["forward_bf16_16x32_sm80", "input_grad_bf16_64x128_sm80", weight_grad],
        ["forward_bf16_64x128_sm80", "input_grad_bf16_64x128_sm80", weight_grad],
        ["forward_bf16_64x128_sm80", "input_grad_bf16_64x128_sm80", weight_grad],
        ["forward_bf16_128x128_sm80", "input_grad_bf16_128x128_sm80", weight_grad],
        [f"{product}_bf16_64x128_unaligned_sm80" for product in ("forward", "input_grad", "weight_grad")],
    ]


def test_no_kernels_before_sm_80():
    done = run("75")
    assert done.returncode != 0
    assert (
        "ValueError: grouped_gemm: x must lie on a GPU of compute capability 8.0 or newer for the CUDA kernels, got 7.5"
        in done.stderr
    )
