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
from torch import Tensor

from moduleformer_ext import ops

Step = Callable[[], tuple[Tensor, ...]]


def attention(q, k, v):
    return ops.stick_attention(q, k, v, stick_epsilon=0.0)


def attention_v_is_k(q, k):
    return ops.stick_attention(q, k, None)


def decoding(q, k):
    lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)
    with torch.no_grad():
        return ops.stick_attention_decode(q[:, -1:], k, None, lengths)


def routed(expert_network, x_router, gate, x, *weights):
    route = ops.route_topk_linear(x_router, gate, 2)
    return expert_network(x, *weights, ops.expert_layout(route.expert_ids, len(gate)), route.gates)


def experts(x_router, gate, x, up, down):
    return routed(ops.expert_ffn, x_router, gate, x, up, down)


def mlp_router(x, hidden, bias, weight):
    return ops.route_topk_mlp(x, hidden, bias, weight, 2).gates


CASES = {
    attention: [(2, 48, 4, 64), (2, 48, 2, 64), (2, 48, 2, 64)],
    attention_v_is_k: [(2, 48, 2, 1024), (2, 48, 1, 1024)],
    decoding: [(2, 48, 4, 64), (2, 48, 2, 64)],
    experts: [(40, 64), (8, 64), (40, 64), (8, 64, 96), (8, 96, 64)],
    mlp_router: [(40, 64), (32, 64), (32,), (8, 32)],
}


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
    # A bias in float: of another type it would be converted, by PyTorch.
    leaves = [
        torch.randn(shape, device=device).to(torch.bfloat16 if len(shape) > 1 else torch.float32) for shape in CASES[op]
    ]
    for leaf in leaves:
        leaf.requires_grad_(op is not decoding)
    cotangent = torch.randn_like(op(*leaves))

    def step() -> tuple[Tensor, ...]:
        y = op(*leaves)
        return (y, *torch.autograd.grad(y, leaves, cotangent)) if y.requires_grad else (y,)

    with captured(step) as (found, replay):
        for _ in range(3):
            with torch.no_grad():
                for leaf in leaves:
                    leaf.copy_(torch.randn_like(leaf))
            replay()
            for result, expected in zip(found, step(), strict=True):
                assert torch.equal(result, expected)


@pytest.mark.skipif(not EMULATED, reason="a GPU's failed capture would reach the tests behind it")
def test_the_emulated_capture_refuses_what_a_gpu_refuses():
    import ctypes

    import cudasim

    with pytest.raises(cudasim.CudaSimError, match="captures do not allow"), cudasim.capture():
        assert cudasim.lib().cudaDeviceSynchronize() != 0
    assert cudasim.lib().cudaGetLastError() == 0
    assert cudasim.lib().cudaMalloc(ctypes.byref(ctypes.c_void_p()), 16) == 0  # the failed capture is over
