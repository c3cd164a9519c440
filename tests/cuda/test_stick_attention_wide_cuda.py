"""Head dims above 256, which stick_attention's CUDA kernels split over the warps of a block."""

import pytest
import torch
from devices import EMULATED, HOPPER
from stick_cases import check, inputs
from test_stick_attention_cuda import DTYPES

from moduleformer_ext.ops import stick_attention

SHAPES = [  # batch, t_q, t_k, heads, group, dim, shared
    (1, 40, 40, 1, 2, 1024, True),
    (2, 17, 50, 2, 2, 512, True),
    (1, 33, 33, 1, 1, 264, True),
    (1, 1, 20, 1, 4, 1000, True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"stick_epsilon": 0.0, "attend_current": False, "scale": -0.03}])
def test_against_the_reference(dtype, shape, options, device):
    *sizes, shared = shape
    # Dot products of up to 1024 terms, added up one after the other.
    check(device, *inputs(*sizes, dtype, shared=shared), floor=1e-5, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_v_of_its_own(dtype, device):
    check(device, *inputs(1, 33, 40, 1, 3, 1000, dtype))


def test_v_of_its_own_has_no_float32_gradient(device):
    q, k, v = (t.to(device).requires_grad_() for t in inputs(1, 5, 5, 1, 1, 512, torch.float32))
    with pytest.raises(ValueError, match="v must be k to have a float32 gradient"):
        stick_attention(q, k, v).sum().backward()


def test_any_order_of_warps(device, schedule):
    check(device, *inputs(1, 40, 70, 1, 2, 1024, torch.bfloat16, shared=True, seed=schedule), stick_epsilon=0.0)


def test_masked_and_packed(device):
    q, k, _ = inputs(2, 20, 33, 1, 2, 768, torch.bfloat16, shared=True)
    mask = torch.rand(2, 33, generator=torch.Generator().manual_seed(0)) < 0.6
    check(device, q, k, None, key_padding_mask=mask)
    q, k, _ = inputs(1, 30, 50, 1, 2, 264, torch.bfloat16, shared=True)
    cu_q, cu_k = torch.tensor([0, 5, 5, 30]).int(), torch.tensor([0, 9, 9, 50]).int()
    check(device, q[0], k[0], None, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def test_walks_through_several_windows(device):
    check(device, *inputs(1, 20, 2100, 1, 1, 264, torch.bfloat16, shared=True), stick_epsilon=0.0, floor=4e-5)


def test_same_bits_every_time(device):
    q, k, _ = (t if t is None else t.to(device) for t in inputs(1, 40, 70, 1, 2, 1024, torch.bfloat16, shared=True))
    results = []
    for _ in range(3):
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        o = stick_attention(*leaves, None)
        results.append((o, *torch.autograd.grad(o.float().square().sum(), leaves)))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


@pytest.mark.skipif(not EMULATED, reason="counts are the emulator's")
def test_counts(device):
    """One head of 1024, K = V, 256 positions and two query heads, nothing cut off."""
    import cudasim

    q, k, _ = inputs(1, 256, 256, 1, 2, 1024, torch.bfloat16, shared=True)
    cudasim.reset_stats()
    stick_attention(q.to(device), k.to(device), None, stick_epsilon=0.0)
    (launch,) = cudasim.stats()
    useful = 2 * 2 * 1024 * 2 * (256 * 257 // 2)
    # Hopper's takes all of the tile of 64 keys on the diagonal, where sm_80's steps are of 16.
    assert launch["mma_flops"] <= (1.28 if HOPPER else 1.25) * useful
    assert launch["shared_excess_wavefronts"] <= 0.02 * launch["shared_wavefronts"]


@pytest.mark.skipif(not EMULATED, reason="counts are the emulator's")
def test_instructions_per_score(device):
    """Upper bounds, a regression fails. As above, 128 positions."""
    import cudasim

    q, k, _ = inputs(1, 128, 128, 1, 2, 1024, torch.bfloat16, shared=True)
    leaves = [q.to(device).requires_grad_(), k.to(device).requires_grad_()]
    cudasim.reset_stats()
    stick_attention(*leaves, None, stick_epsilon=0.0).sum().backward()
    scores = 2 * (128 * 129 // 2)
    counts = {stats["kernel"].split("_bf16")[0]: stats["thread_instructions"] / scores for stats in cudasim.stats()}
    for kernel, most in {"stick_fwd": 410, "stick_bwd_query": 700, "stick_bwd_key": 740}.items():
        assert counts[kernel] <= most, kernel
