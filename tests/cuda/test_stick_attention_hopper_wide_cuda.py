"""The sm_90a forward kernel of head dims above 256 where K is V: a cluster of two blocks per tile of rows. Exactness
over shapes and options is in test_stick_attention_wide_cuda.py, on every architecture."""

import pytest
import torch
from devices import EMULATED, HOPPER
from stick_cases import relative_error
from stick_walks import TILE, first_tiles, rows_of_logits

from moduleformer_ext import reference

if EMULATED:
    import cudasim

pytestmark = pytest.mark.skipif(not HOPPER, reason="needs the emulated Hopper and its kernels")
BACKWARD_KEYS = 16  # of a tile of sm_80's backward kernels, which first_tiles are for


def forward(q, k, v, epsilon=0.0, for_backward=False, attend_current=True):
    return torch.ops.moduleformer_ext.stick_attention_forward(
        q, k, v, None, attend_current, None, None, None, epsilon, for_backward
    )


def counted(q, k, v):
    cudasim.reset_stats()
    forward(q, k, v)
    (launch,) = cudasim.stats()
    return launch


def operands(t_q, t_k, group, dim, dtype):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, t_q, 1, group, dim, generator=generator) * 0.3
    return q.to(dtype), torch.randn(1, t_k, 1, dim, generator=generator).to(dtype)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_what_it_serves(dtype, name):
    for dim, kernel in ((256, "d256_sm80"), (264, "d1024_sm90a"), (1024, "d1024_sm90a")):
        q, k = operands(3, 5, 1, dim, dtype)
        assert counted(q, k, k)["kernel"] == f"stick_fwd_{name}_{kernel}"
    assert counted(q, k, k.clone())["kernel"] == f"stick_fwd_{name}_d1024_sm80"


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("logits", [(8, -9), (-9, 8), (-3, -9), (-9, -3), (-2.5, -3)])
def test_four_warpgroups_end_as_one(logits):
    q, k, _ = rows_of_logits(logits, 420, 1024, torch.bfloat16)
    o, remainder, _, first = forward(q, k, k, 2**-24)
    exact, exact_remainder = reference.stick_attention(*(x.double() for x in (q, k, k)), return_remainder=True)
    assert torch.equal(first, first_tiles(q, k, 2**-24) * (TILE // BACKWARD_KEYS))
    assert relative_error(o, exact) < 4e-3
    assert (remainder - exact_remainder).abs().max() < 1e-6
    again = forward(q, k, k, 2**-24, for_backward=True)
    assert torch.equal(o, again[0]) and torch.equal(remainder, again[1])


@pytest.mark.parametrize(("t_q", "group"), [(1, 1), (63, 1), (65, 1), (22, 3), (1, 130)])
@pytest.mark.parametrize("attend_current", [True, False])
def test_rows_at_the_edges_of_tiles(t_q, group, attend_current):
    q, k = operands(t_q, t_q + 70, group, 1000, torch.float16)
    exact = reference.stick_attention(*(x.double() for x in (q, k, k)), attend_current=attend_current)
    assert relative_error(forward(q, k, k, attend_current=attend_current)[0], exact) < 1e-3


def test_rows_that_see_no_key():
    q, k = operands(1, 1, 3, 1024, torch.bfloat16)
    o, remainder, *_ = forward(q, k, k, attend_current=False)
    assert not o.any() and (remainder == 1).all()


def test_rows_at_any_address():
    q, k = operands(9, 70, 2, 1001, torch.bfloat16)
    q, k = q[..., 1:], k[..., 1:]
    assert relative_error(forward(q, k, k)[0], reference.stick_attention(q.double(), k.double(), k.double())) < 4e-3


def test_counts():
    """Of 64 rows of one head of 1024, 256 keys and 256 more: what tiles cost, without beginnings and ends of blocks."""
    few, more = (counted(*operands(64, keys, 1, 1024, torch.bfloat16)[:1], *[keys_of(keys)] * 2) for keys in (256, 512))
    tiles, scores = 4, 4 * TILE * TILE  # that the second has more
    per_tile = {name: (more[name] - few[name]) / tiles for name in more if isinstance(more[name], int)}
    assert per_tile["mma_flops"] == 2 * 2 * TILE * TILE * 1024  # nothing twice
    assert per_tile["global_load_sectors"] == TILE * 1024 * 2 / 32  # each block has half of a tile
    assert more["shared_excess_wavefronts"] == 0
    assert (more["thread_instructions"] - few["thread_instructions"]) / scores <= 84


def keys_of(tokens):
    return operands(1, tokens, 1, 1024, torch.bfloat16)[1]
