"""Settings for all tests."""

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# A change is judged by the same examples wherever it is tested; new ones are found at the developer's desk.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

# On the emulated device every tensor is a device allocation, with exact bounds and poisoned contents.
EMULATED = "CUDASIM_LIB" in os.environ
if EMULATED:
    import cudasim

    cudasim.use_torch_allocator()


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """A test that asks for it runs with the CPU's kernels and on a GPU; under tools/emulated.sh the CUDA kernels serve
    CPU tensors."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU; `make test-emulated` runs the CUDA kernels without one")
    return torch.device(request.param)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads for the time of a test."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    """What an op leaves out of its outputs shows: torch fills new tensors with NaN, or the largest integer."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few small texts."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        words = " ".join(f"word{number * index % 11}" for index in range(50))
        (folder / f"{number}.txt").write_text(f"{words}\n")
    return folder


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each call of ops.blocks_decode had."""
    from moduleformer_ext import ops  # not before the emulated device has the allocator

    seen: list[int] = []
    op = ops.blocks_decode
    monkeypatch.setattr(ops, "blocks_decode", lambda *a, **k: seen.append(len(a[2])) or op(*a, **k))
    return seen


def pytest_itemcollected(item: pytest.Item) -> None:
    if "device" in getattr(item, "fixturenames", ()) or "/tests/cuda/" in item.path.as_posix():
        item.add_marker(pytest.mark.cuda)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skips what the CUDA kernels say they do not do: the same tests run with those of the CPU."""
    try:
        return (yield)
    except ValueError as error:
        if "only the CPU has kernels for float64" in str(error):
            pytest.skip("float64 has CPU kernels alone")
        raise
