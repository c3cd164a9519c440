"""The sm_90a kernels of stick_attention, forward and backward: what they serve, and what sm_80's have no counterpart
of, two or three warpgroups that walk the same tiles and end for themselves or leave tiles to each other. All else is
tested on every architecture alike."""

import re

import pytest
import torch
from devices import EMULATED, HOPPER
from stick_cases import check, inputs, relative_error, run
from stick_walks import TILE, first_tiles, rows_of_logits

from moduleformer_ext import reference
from moduleformer_ext.ops import stick_attention

if EMULATED:
    import cudasim

TWO = ((8, -9), (-9, 8), (-3, -9), (-9, -3), (-3, 8), (8, 8), (-9, -9), (-2.5, -3))
THREE = ((-9, -9, 8), (8, -9, -9), (-9, 8, -3))
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs the emulated Hopper and its kernels")
RAW = torch.ops.moduleformer_ext


def launched(q, k, v, **options):
    """Of forward and of both of backward, without what their names begin with."""
    cudasim.reset_stats()
    stick_attention(q.requires_grad_(), k, v, **options).sum().backward()
    found = [re.fullmatch(r"stick_(?:fwd|bwd_query|bwd_key)_(.*)", launch["kernel"]) for launch in cudasim.stats()]
    return [name[1] for name in found if name]


def forward(q, k, v, epsilon, for_backward=False):
    return RAW.stick_attention_forward(q, k, v, None, True, None, None, None, epsilon, for_backward)


@pytest.mark.parametrize(
    ("dtype", "dim", "kernel"),
    [
        (torch.bfloat16, 8, "bf16_d64_sm90a"),
        (torch.bfloat16, 64, "bf16_d64_sm90a"),
        (torch.bfloat16, 72, "bf16_d128_sm90a"),
        (torch.float16, 64, "fp16_d64_sm90a"),
        (torch.float16, 128, "fp16_d128_sm90a"),
        (torch.bfloat16, 136, "bf16_d256_sm80"),
        (torch.float32, 64, "fp32_d64_sm80"),
    ],
)
def test_what_hopper_serves(dtype, dim, kernel):
    q, k, v = inputs(1, 5, 9, 1, 1, dim, dtype)
    assert launched(q, k, v) == [kernel] * 3
    assert launched(q, k, None) == [kernel] * 3
    spaced = torch.zeros(1, 9, 1, dim + 1, dtype=dtype)[..., 1:]  # at any address
    assert launched(q, spaced, v) == [kernel] * 3
    lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = [x[0].detach() for x in (q, k[:, :5], v[:, :5])]
    assert launched(*packed, cu_seqlens_q=lengths, cu_seqlens_k=lengths) == [kernel] * 3


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "shared"), [(64, False), (64, True), (128, False), (128, True)])
def test_more_tiles_than_stages(dtype, dim, shared, device):
    q, k, v = inputs(1, 200, 700, 1, 1, dim, dtype, shared=shared, mean=-6.0)
    check(device, q, k, v, stick_epsilon=0.0)


@pytest.mark.parametrize("group", [1, 3, 64, 130])
@pytest.mark.parametrize("t_q", [1, 63, 64, 65, 129])
def test_rows_at_the_edges_of_warpgroups(t_q, group, device):
    if t_q * group > 1000:
        pytest.skip("as others, and slow")
    for dim in (64, 128):
        q, k, v = inputs(1, t_q, t_q + 70, 1, group, dim, torch.bfloat16)
        check(device, q, k, v, attend_current=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_states_of_every_width(dtype, dim, device):
    """On the diagonal the dQ kernel leaves the dK/dV kernel runs of 4, 8 or 16 keys, with padding and without."""
    for t_q, t_k in ((130, 130), (70, 101), (40, 199)):
        q, k, v = inputs(2, t_q, t_k, 1, 1, dim, dtype, mean=-3.0)
        check(device, q, k, v)
        kept = torch.rand(2, t_k, generator=torch.Generator().manual_seed(t_k)) < 0.7
        check(device, q, k, v, key_padding_mask=kept)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("logits", [(-9, 8, 8, 8, 8, 8, -9), (8, -9, -3, -9, 8, 8, 8), (8, 8, 8, 8, 8, 8, 8)])
def test_query_tiles_that_one_warpgroup_of_keys_takes(logits, dim, device):
    """More of them in a row than the ring has stages, between others that both take."""
    q, k, v = rows_of_logits(logits, 64 * len(logits) + 192, dim, torch.bfloat16)
    ours = run(stick_attention, q, k, v, device=device)
    exact = run(reference.stick_attention, q, k, v, dtype=torch.float64)
    rounded = run(reference.stick_attention, q, k, v)
    for value, peer, truth in zip(ours, rounded, exact, strict=True):
        assert relative_error(value, truth, 2**-24) <= 2 * relative_error(peer, truth) + 4e-3
    again = run(stick_attention, q, k, v, device=device)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("logits", [(-3, -9), (-9, -3), (-9, -9), (-9, -3, -9)])
def test_each_warpgroup_walks_its_windows(logits, dim, device):
    """Keys of several windows of 1024, of which a warpgroup may walk the newest alone."""
    q, k, v = rows_of_logits(logits, 1200, dim, torch.bfloat16)
    options = {"stick_epsilon": 2**-24}
    exact = run(reference.stick_attention, q, k, v, dtype=torch.float64)
    rounded = run(reference.stick_attention, q, k, v)
    for value, peer, truth in zip(run(stick_attention, q, k, v, device=device, **options), rounded, exact, strict=True):
        assert relative_error(value, truth, 2**-24) <= 2 * relative_error(peer, truth) + 4e-3


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "logits", [(8, -9), (-9, 8), (-3, -9), (-9, -3), (-3, 8), (8, 8), (-9, -9), (-2.5, -3), *THREE]
)
def test_each_warpgroup_ends_for_itself(logits, dim):
    q, k, v = rows_of_logits(logits, 700, dim, torch.bfloat16)
    o, remainder, _, first = forward(q, k, v, 2**-24)
    exact, exact_remainder = reference.stick_attention(*(x.double() for x in (q, k, v)), return_remainder=True)
    assert torch.equal(first, first_tiles(q, k, 2**-24))
    assert relative_error(o, exact) < 4e-3
    assert (remainder - exact_remainder).abs().max() < 1e-6
    assert torch.equal(o, forward(q, k, v, 2**-24, for_backward=True)[0])


def test_exhausted_sticks_load_no_more():
    """The loading warpgroup is a ring of stages ahead, and stops with the last of those that multiply."""
    q, k, v = rows_of_logits((8, 8), 4000, 64, torch.bfloat16)
    cudasim.reset_stats()
    forward(q, k, v, 2**-24)
    (launch,) = cudasim.stats()
    tile = 2 * TILE * 64 * 2  # bytes of K and V
    queries = q.numel() * 2
    diagonal, end, stages = 2, 1, 4  # tiles: of a block's rows themselves, where their sticks end, ahead in the ring
    assert launch["global_load_sectors"] * 32 <= 1.1 * (queries + (diagonal + end + stages) * tile)
