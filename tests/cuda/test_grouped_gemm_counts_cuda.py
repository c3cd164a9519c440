"""Upper bounds on what the expert layer's kernels do, counted on the emulated device: a regression fails here.

Shapes: 8 experts, 2 per token, 512 features, bfloat16. ScatterMoE's scatter2scatter (Triton 3.9, sm_80, four warps,
the same routing) takes 128.2, 80.6 and 56.8 lane instructions per output element at 256, 512 and 1024 slots, and
multiplies 4.5, 2.75 and 1.88 times as much as needed; its kernel for the weights' gradients takes 158, 93 and 61. PTX
is counted, not SASS.
"""

from __future__ import annotations

import pytest
import torch
from devices import HOPPER
from routed import ffn_values, on, random_layout

from moduleformer_ext.ops import expert_ffn, grouped_gemm

cudasim = pytest.importorskip("cudasim")

FEATURES, EXPERTS = 512, 8
SCATTER2SCATTER = {256: 128.2, 512: 80.6, 1024: 56.8}
SCATTER_WEIGHT_GRAD = {256: 158, 512: 93, 1024: 61}


@pytest.fixture(autouse=True)
def emulated(device):
    if device.type == "cuda":
        pytest.skip("counts come from the emulated device")
    if HOPPER:
        pytest.skip("the bounds are those of sm_80's kernels")


def launches(run):
    cudasim.reset_stats()
    run()
    return cudasim.stats()


def useful_flops(slots):
    return 2 * slots * FEATURES * FEATURES


@pytest.mark.parametrize("slots", SCATTER2SCATTER)
def test_forward_product(slots, device):
    layout = random_layout(slots // 2, EXPERTS, 2)
    x = torch.randn(slots // 2, FEATURES).bfloat16()
    weight = torch.randn(EXPERTS, FEATURES, FEATURES).bfloat16()
    (s,) = launches(lambda: grouped_gemm(x, weight, layout, out_order="slot"))
    assert s["warp_instructions"] * 32 <= 0.7 * SCATTER2SCATTER[slots] * slots * FEATURES
    assert s["mma_flops"] <= 1.3 * useful_flops(slots)
    assert s["shared_excess_wavefronts"] == 0

    rows = 128 if "_128x128_" in s["kernel"] else 64
    row_tiles = sum(-(-count // rows) for count in layout.counts.tolist())
    column_tiles = FEATURES // 128
    sector = 32 // 2  # elements
    minimum = (slots * FEATURES * column_tiles + row_tiles * FEATURES * FEATURES + slots * FEATURES) // sector
    assert s["global_load_sectors"] + s["global_store_sectors"] <= 1.1 * minimum


@pytest.mark.parametrize("slots", SCATTER_WEIGHT_GRAD)
def test_weight_gradient(slots, device):
    layout = random_layout(slots // 2, EXPERTS, 2)
    x = torch.randn(slots // 2, FEATURES).bfloat16()
    weight = torch.randn(EXPERTS, FEATURES, FEATURES).bfloat16().requires_grad_()
    y = grouped_gemm(x, weight, layout, out_order="slot")
    (s,) = launches(y.sum().backward)
    assert s["warp_instructions"] * 32 <= 0.96 * SCATTER_WEIGHT_GRAD[slots] * slots * FEATURES
    assert s["mma_flops"] <= 1.2 * useful_flops(slots)
    assert s["shared_excess_wavefronts"] == 0


@pytest.mark.parametrize("slots", [256, 1024])
def test_expert_layer(slots, device):
    layout = on(random_layout(slots // 2, EXPERTS, 2), device)
    values = [v.requires_grad_() for v in ffn_values(layout, FEATURES, FEATURES, torch.bfloat16, "gelu_tanh")]
    x, up, down, gates = values

    def run():
        expert_ffn(x, up, down, layout, gates).sum().backward()

    products = [s for s in launches(run) if s["mma_flops"]]
    assert len(products) == 6
    for s in products:
        assert s["mma_flops"] <= 1.3 * useful_flops(slots)
        assert s["shared_excess_wavefronts"] == 0


def test_decoding_multiplies_and_reads_little_beside_the_matrices(device):
    layout = random_layout(1, EXPERTS, 2)
    x, weight = torch.randn(1, FEATURES).bfloat16(), torch.randn(EXPERTS, FEATURES, FEATURES).bfloat16()
    (s,) = launches(lambda: grouped_gemm(x, weight, layout, out_order="slot"))
    assert "_16x32_" in s["kernel"]
    assert s["mma_flops"] <= 16 * useful_flops(2)
    assert s["cp_async_bytes"] <= 1.1 * 2 * weight[0].nbytes
