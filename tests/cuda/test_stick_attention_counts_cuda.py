"""What the kernels of stick_attention execute, counted on the emulated device: upper bounds, a regression fails.

Counts are of PTX and per causal score (bf16, one head, stick_epsilon 0). The goals were 18.2 and 23.6 lane instructions
forward, 59 and 88 backward (head dim 64 and 128). Forward for training also writes what rounding took from o.
"""

import pytest
import torch
from devices import EMULATED, HOPPER

from moduleformer_ext.ops import stick_attention

ROWS = {64: 192, 128: 128} if HOPPER else {64: 64, 128: 64}
"""By head dim, query rows of a block of forward and of backward's dQ, which reads a tile of keys once. Of the tile on
the diagonal sm_80's warps leave out keys that they do not see, a warpgroup of sm_90a multiplies all."""

pytestmark = pytest.mark.skipif(not EMULATED, reason="counts need the emulated device")


def launches(t, dim):
    """Statistics per kernel of forward alone and of a forward and a backward pass, and the number of scores."""
    import cudasim

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, t, 1, dim, generator=generator).to(torch.bfloat16).requires_grad_() for _ in range(3))
    cudasim.reset_stats()
    with torch.no_grad():
        stick_attention(q, k, v, stick_epsilon=0.0)
    (inference,) = cudasim.stats()
    cudasim.reset_stats()
    stick_attention(q, k, v, stick_epsilon=0.0).sum().backward()
    (training,) = (s for s in cudasim.stats() if s["kernel"].startswith("stick_fwd"))
    backward = [s for s in cudasim.stats() if s["kernel"].startswith("stick_bwd")]
    assert len(backward) == 3  # bounds of |v|, query kernel, key kernel: one window
    return inference, training, backward, t * (t + 1) / 2


@pytest.mark.parametrize(
    ("dim", "most_inference", "most_training", "most_backward"),
    [(64, 20.2, 21.4, 64.2), (128, 22.2, 24.3, 74.0)] if HOPPER else [(64, 15.7, 16.9, 59.0), (128, 22.6, 24.7, 86.5)],
)
def test_instructions_per_score(dim, most_inference, most_training, most_backward):
    inference, training, backward, scores = launches(512, dim)
    assert inference["thread_instructions"] / scores <= most_inference
    assert training["thread_instructions"] / scores <= most_training
    assert sum(s["thread_instructions"] for s in backward) / scores <= most_backward
    for stats in (inference, training, *backward):
        assert 32 * stats["issued"]["sfu"] / scores <= 2.4, stats["kernel"]
        assert stats["shared_excess_wavefronts"] == 0, stats["kernel"]  # bank conflicts


@pytest.mark.parametrize("dim", [64, 128])
def test_traffic_and_flops(dim):
    t = 1024
    forward, training, backward, scores = launches(t, dim)
    useful = 2 * dim * scores  # of one product
    beyond = 1.07 if HOPPER else 1.04 if dim == 64 else 1.03  # warps of 32 rows leave out less of the diagonal tile
    assert forward["mma_flops"] <= beyond * 2 * useful
    products = 7  # S and dP in both kernels, dQ, dK, dV; there are lengths, delta and tests of finiteness, too
    assert sum(s["mma_flops"] for s in backward) <= (1.09 if HOPPER else 1.05) * products * useful
    sectors = dim * 2 // 32
    keys = sum(min(first + ROWS[dim], t) for first in range(0, t, ROWS[dim]))  # that all blocks see
    least_read = (t + 2 * keys) * sectors  # Q once, K and V once per block
    least_written = t * sectors + 2 * t * 4 // 32  # o, remainder, first_tiles
    assert forward["global_load_sectors"] <= 1.1 * least_read
    assert forward["global_store_sectors"] <= 1.1 * least_written
    assert training["global_load_sectors"] <= 1.1 * least_read
    assert training["global_store_sectors"] <= 1.1 * (least_written + t * sectors)  # and the residual


@pytest.mark.skipif(HOPPER, reason="wgmma reads shared memory uncounted")
def test_wavefronts_of_a_tile():
    """Of a whole one of 64 x 64 scores; 640 where each of four warps read it for 16 rows."""
    import cudasim

    def wavefronts(t):
        q, k, v = torch.randn(3, 1, t, 1, 64).to(torch.bfloat16)
        cudasim.reset_stats()
        stick_attention(q, k, v, stick_epsilon=0.0)
        return cudasim.stats()[0]["shared_wavefronts"]

    once, twice = wavefronts(128), wavefronts(256)  # 2 and 4 blocks with 1 and 6 whole tiles
    assert (twice - 2 * once) / 4 <= 384
