"""Every op, forward and backward, captured once in a CUDA graph and replayed on other inputs: no call that captures do
not allow, and nothing that the host would have to do again.

On the emulated device only the kernels are part of the graph, what PyTorch computes itself is not. So the steps below
leave it nothing to compute.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from devices import EMULATED
from steps import CASES, cotangent_of, leaves_of, run
from torch import Tensor

Step = Callable[[], tuple[Tensor, ...]]


@contextmanager
def captured(step: Step) -> Iterator[tuple[tuple[Tensor, ...], Callable[[], None]]]:
    """The step's outputs, still without values, and what gives them some."""
    if EMULATED:
        import cudasim

        with cudasim.capture() as graph:
            outputs = step()
        yield outputs, graph.replay
        graph.close()
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up, as capture demands
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    yield outputs, graph.replay


@pytest.mark.parametrize("op", CASES, ids=lambda op: op.__name__)
def test_replays_equal_eager_calls(op, device):
    leaves = leaves_of(op, torch.bfloat16, device)
    cotangent = cotangent_of(op, leaves)

    def step() -> tuple[Tensor, ...]:
        return run(op, leaves, cotangent)

    with captured(step) as (found, replay):
        for _ in range(3):
            with torch.no_grad():
                for leaf in leaves:
                    leaf.copy_(torch.randn_like(leaf))
            replay()
            for result, expected in zip(found, step(), strict=True):
                assert torch.equal(result, expected)


@pytest.mark.skipif(not EMULATED, reason="a GPU's failed capture would reach the tests after it")
def test_the_emulated_capture_refuses_what_a_gpu_refuses():
    import ctypes

    import cudasim

    with pytest.raises(cudasim.CudaSimError, match="captures do not allow"), cudasim.capture():
        assert cudasim.lib().cudaDeviceSynchronize() != 0
    assert cudasim.lib().cudaGetLastError() == 0
    assert cudasim.lib().cudaMalloc(ctypes.byref(ctypes.c_void_p()), 16) == 0  # the failed capture is over
