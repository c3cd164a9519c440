"""Tests of the CUDA kernels: on a GPU, or on the emulated device with `make test-emulated`.

There MFX_CUDA_DISPATCH=CPU makes the CUDA kernels serve CPU tensors. The references are plain PyTorch
and run on the CPU as ever.
"""

from collections.abc import Iterator

import pytest
import torch
from devices import EMULATED

if EMULATED:
    import cudasim


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if EMULATED or torch.cuda.is_available():
        return
    for item in items:
        if "/tests/cuda/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or the emulated device of `make test-emulated`"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if EMULATED else "cuda")


@pytest.fixture(params=[0, 1, 2])
def schedule(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a test under several orders of warps and landing times of asynchronous copies."""
    if not EMULATED:
        if request.param:
            pytest.skip("a GPU schedules as it likes")
        yield 0
        return
    cudasim.set_seed(request.param)
    yield request.param
    cudasim.set_seed(0)


@pytest.fixture
def one_multiprocessor() -> Iterator[None]:
    """Persistent blocks go round more than once. What a test broke on the emulated device is forgotten after it."""
    before = cudasim.set_multiprocessors(1)
    yield
    cudasim.set_multiprocessors(before)
    cudasim.set_seed(0)
    cudasim.clear_fault()
    cudasim.reset_races()
