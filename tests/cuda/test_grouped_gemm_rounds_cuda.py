"""Persistent kernels of grouped_gemm whose blocks have several tiles each, as on a GPU; an emulated one has more
multiprocessors than tests have tiles."""

from __future__ import annotations

import pytest
import torch
from devices import EMULATED
from routed import compare, ffn_values, grouped_values, layout_of, random_layout

from moduleformer_ext.ops import expert_ffn, grouped_gemm

if EMULATED:
    pass

pytestmark = [
    pytest.mark.skipif(not EMULATED, reason="needs the emulated device"),
    pytest.mark.usefixtures("one_multiprocessor"),
]


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("rows", [(70, 20, 66), (20, 70, 0, 400)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grouped_gemm(rows, dtype, device):
    """Experts of one and of two blocks of 64 rows, more slices of depth than a ring has stages."""
    torch.manual_seed(15)
    layout = layout_of([[expert] for expert, count in enumerate(rows) for _ in range(count)], len(rows))
    x, weight, gates = grouped_values(layout, "token", 7 * 64 + 8, 136, dtype, True)
    if dtype == torch.float16:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    compare(grouped_gemm, layout, [x, weight, gates], device, out_order="token")


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_expert_ffn(activation, device):
    torch.manual_seed(16)
    layout = random_layout(150, 4, 2)
    values = ffn_values(layout, 136, 200, torch.bfloat16, activation)
    compare(expert_ffn, layout, values, device, activation=activation)
