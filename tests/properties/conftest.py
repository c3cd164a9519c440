"""Properties that hold of every kernel: the same tests run on the CPU, on a GPU and on the emulated device, where the
CUDA kernels serve CPU tensors (tools/emulated.sh)."""

import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU; `make test-emulated` runs the CUDA kernels without one")
    return torch.device(request.param)
