"""What `moduleformer-ext info` lists is what runs."""

import pytest
import torch
from devices import EMULATED

from moduleformer_ext._extension import cuda_kernels
from moduleformer_ext.ops import expert_layout, grouped_gemm, stick_attention


@pytest.mark.skipif(not EMULATED, reason="names of launches come from the emulated device")
def test_launched_kernels_are_listed():
    import cudasim

    q = torch.randn(1, 5, 1, 64).bfloat16().requires_grad_()
    x, layout = torch.randn(5, 64).bfloat16(), expert_layout(torch.tensor([[0], [1], [1], [0], [1]]), 2)
    weight = torch.randn(2, 64, 64).bfloat16().requires_grad_()
    cudasim.reset_stats()
    stick_attention(q, q, q).sum().backward()
    grouped_gemm(x, weight, layout).sum().backward()
    launched = {launch["kernel"] for launch in cudasim.stats()}
    listed = {name for _, name, _ in cuda_kernels()}
    named = {name for name in launched if name.startswith(("stick_", "grouped_"))}
    assert len(named) >= 5
    assert named <= listed
