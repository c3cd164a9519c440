"""Every op, forward and backward, captured once in a CUDA graph and replayed on other inputs. Needs a GPU: the emulated
device's tensors have no stream of their own to capture."""

import pytest
import torch

from moduleformer_ext import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def attention(q, k):
    return ops.stick_attention(q, k, k)


def decoding(q, k):
    lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)
    with torch.no_grad():
        return ops.stick_attention_decode(q[:, -1:], k, None, lengths)


def experts(x, gate, up, down):
    route = ops.route_topk_linear(x, gate, 2)
    layout = ops.expert_layout(route.expert_ids, len(gate))
    return ops.expert_ffn(x, up, down, layout, route.gates)


def shapes_of(op):
    if op is experts:
        return (40, 64), (8, 64), (8, 64, 96), (8, 96, 64)
    return (2, 48, 4, 64), (2, 48, 2, 64)


@pytest.mark.parametrize("op", [attention, decoding, experts])
def test_replays_equal_eager_calls(op):
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes_of(op)]
    leaves = [x.requires_grad_(op is not decoding) for x in inputs]

    def step():
        y = op(*leaves)
        return (y, *torch.autograd.grad(y.float().square().sum(), leaves)) if y.requires_grad else (y,)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up, as capture demands
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for x in leaves:
                x.copy_(torch.randn_like(x))
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)
