"""A kernel much slower than the op's usual one is never taken in silence."""

import os
import subprocess
import sys

CODE = """
import torch
from moduleformer_ext._extension import build_info
from moduleformer_ext.ops import expert_layout, grouped_gemm, stick_attention
device = "cpu" if build_info()["cuda_dispatch"] == "CPU" else "cuda"
layout = expert_layout(torch.tensor([[0], [1]], device=device), 2)
x, weight = torch.randn(2, 7, device=device), torch.randn(2, 7, 8, device=device)
for _ in range(2):
    grouped_gemm(x, weight, layout)
q = torch.randn(1, 3, 1, 9, device=device)[..., 1:]
stick_attention(q, q, q)
"""


def run(**variables):
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", CODE],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_slow_kernel_warns_once_per_op():
    done = run(MFX_STRICT="0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("grouped_gemm: a slow CUDA kernel serves this: rows of a tensor") == 1
    assert done.stderr.count("stick_attention: a slow CUDA kernel serves this: rows of a tensor") == 1


def test_strict_makes_it_an_error():
    done = run(MFX_STRICT="1")
    assert done.returncode != 0
    assert "RuntimeError: grouped_gemm: no fast CUDA kernel serves this: rows of a tensor" in done.stderr
