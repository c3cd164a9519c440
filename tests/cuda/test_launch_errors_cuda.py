"""What a refused launch says and leaves behind, on an emulated device with 99 KiB of shared memory per block."""

import os
import subprocess
import sys

import pytest
import torch
from devices import EMULATED

pytestmark = pytest.mark.skipif(not EMULATED, reason="needs the emulated device")

SETUP = """
import ctypes, torch
from moduleformer_ext.ops import expert_layout, stick_attention
runtime = ctypes.CDLL("libcudart.so.13")
ids = torch.tensor([[0], [1]])
def backward():
    q = torch.randn(1, 2, 1, 256, requires_grad=True)
    return stick_attention(q, q.detach(), q.detach()).sum().backward()
"""


def run(code, arch):
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code],
        env={**os.environ, "CUDASIM_ARCH": arch},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arch", ["86", "89"])
def test_a_refused_launch_says_what_it_needs_and_leaves_no_error(arch):
    out = run(
        """
try:
    backward()
except RuntimeError as error:
    print(error)
assert runtime.cudaPeekAtLastError() == 0
assert expert_layout(ids, 2).counts.tolist() == [1, 1]
""",
        arch,
    )
    assert out.startswith("stick_attention: the CUDA kernels failed: stick_bwd_")
    assert "_fp32_d256_sm80 needs " in out
    assert " KiB of shared memory per block, this GPU has 99 (inputs of shapes [1, 2, 1, 256]" in out


def test_the_first_layout_may_be_captured_in_a_graph():
    run(
        """
import cudasim
cudasim.use_torch_allocator()
ids = torch.tensor([[0], [1]])
with cudasim.capture() as graph:
    counts = expert_layout(ids, 2).counts
graph.replay()
assert counts.tolist() == [1, 1]
""",
        "80",
    )


def test_the_same_launch_runs_where_there_is_enough():
    run("backward()\nassert runtime.cudaPeekAtLastError() == 0", "80")


def test_an_error_that_others_left_stays_and_is_not_ours():
    run(
        """
assert runtime.cudaSetDevice(7) == 101
assert expert_layout(ids, 2).counts.tolist() == [1, 1]
assert runtime.cudaGetLastError() == 101
""",
        "80",
    )


def test_a_refusal_does_not_clear_what_others_left():
    run(
        """
runtime.cudaSetDevice(7)
try:
    backward()
except RuntimeError:
    pass
assert runtime.cudaGetLastError() != 0
assert expert_layout(ids, 2).counts.tolist() == [1, 1]
""",
        "86",
    )


def test_a_missing_cuda_runtime_names_the_versions(tmp_path):
    (tmp_path / "libcudart.so.13").touch()  # found first, and no library
    # The name by which the emulated device is known: without it CPU tensors would not be asked for.
    stub = tmp_path / "stub.so"
    subprocess.run(
        ["g++", "-shared", "-xc++", "-", "-o", stub],
        input='extern "C" { int cudasim_register; }',
        text=True,
        check=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", "import torch; from moduleformer_ext import ops; ops.route_topk(torch.rand(2, 3), 1)"],
        env={**os.environ, "LD_PRELOAD": str(stub), "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "the CUDA kernels cannot be loaded: " in done.stderr
    assert "they were compiled by nvcc 13." in done.stderr
    assert f"torch is built {'for CUDA' if torch.version.cuda else 'without CUDA'}" in done.stderr
