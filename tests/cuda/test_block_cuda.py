"""A whole MoLM block on the CUDA kernels equals the block on the CPU's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import EMULATED
from safetensors.torch import load_file

pytest.importorskip("pydantic", reason="models need more than the kernels do")
import block_run

ROOT = Path(__file__).parents[2]
TOLERANCE = {"fp32": 2e-5, "bf16": 3e-2}
"""Of the norm of each tensor."""
FLOOR = {"fp32": 1e-6, "bf16": 1e-3}
"""Of what is next to nothing, as the routing loss of random weights, a difference of two nearly equal entropies."""


def on_the_cpu(dtype: str, path: Path) -> dict[str, torch.Tensor]:
    """By the ordinary build where this process runs the one that serves CPU tensors with CUDA kernels."""
    if not EMULATED:
        return block_run.run_block(block_run.DTYPES[dtype], torch.device("cpu"))
    if not list((ROOT / "python" / "moduleformer_ext").glob("_C.*.so")):
        pytest.skip("needs the ordinary build, too: make build")
    subprocess.run(
        [sys.executable, block_run.__file__, path, dtype],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
        check=True,
        timeout=300,
    )
    return load_file(path)


@pytest.mark.parametrize("dtype", block_run.DTYPES)
def test_block_forward_backward_and_decoding(dtype, device, tmp_path):
    expected = on_the_cpu(dtype, tmp_path / "cpu.safetensors")
    found = block_run.run_block(block_run.DTYPES[dtype], device)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        error, size = (tensor - expected[name]).norm(), expected[name].norm()
        assert error <= TOLERANCE[dtype] * size + FLOOR[dtype], f"{name}: {error:.2g} of {size:.2g}"
