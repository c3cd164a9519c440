"""torch's settings of float32 precision change nothing on the CPU, and asking for them never fails."""

import pytest
import torch
from tf32_settings import SETTINGS, tf32

from moduleformer_ext.ops import (
    expert_ffn,
    expert_layout,
    grouped_gemm,
    route_topk_linear,
    stick_attention,
    stick_attention_decode,
)


def results(dtype):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    x, up, down, router = leaf(6, 8), leaf(3, 8, 4), leaf(3, 4, 8), leaf(3, 8)
    q, k, v = leaf(1, 5, 2, 8), leaf(1, 7, 2, 8), leaf(1, 7, 2, 8)
    route = route_topk_linear(x, router, 2)
    layout = expert_layout(route.expert_ids, 3)
    gates = route.gates.to(torch.float64 if dtype == torch.float64 else torch.float32)
    outputs = [
        route.gates,
        grouped_gemm(x, up, layout),
        expert_ffn(x, up, down, layout, gates),
        stick_attention(q, k, v),
    ]
    with torch.no_grad():
        lengths = torch.tensor([7], dtype=torch.int32)
        decoded = stick_attention_decode(q, k, v, lengths)
    loss = sum(o.square().sum(dtype=torch.float64) for o in outputs)
    return [*outputs, decoded, *torch.autograd.grad(loss, [x, up, down, router, q, k, v])]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_setting_reaches_the_cpu(dtype, setting):
    plain = results(dtype)
    with tf32(setting):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results(dtype), plain, strict=True))
