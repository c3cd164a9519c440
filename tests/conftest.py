"""Settings for all tests."""

import os
from collections.abc import Generator

import hypothesis
import pytest

# A change is judged by the same examples wherever it is tested; new ones are found at the developer's desk.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

# On the emulated device every tensor is a device allocation, with exact bounds and poisoned contents.
EMULATED = "CUDASIM_LIB" in os.environ
if EMULATED:
    import cudasim

    cudasim.use_torch_allocator()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skips what the CUDA kernels say they do not do, where they serve CPU tensors: the same tests run with both."""
    try:
        return (yield)
    except ValueError as error:
        if EMULATED and "only the CPU has kernels for float64" in str(error):
            pytest.skip("float64 has CPU kernels alone")
        raise
