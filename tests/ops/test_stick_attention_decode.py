import math

import pytest
import torch
from decode_cases import DTYPES, case, check, decode, long_tail, oracle
from devices import on_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import run_with
from strides import spaced

from moduleformer_ext import reference
from moduleformer_ext.ops import stick_attention_decode

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("batch", "new", "kv_heads", "group", "dim", "cache"),
    [
        (1, 1, 1, 2, 1024, 300),
        (1, 1, 1, 4, 1000, 130),
        (1, 2, 1, 1, 768, 100),
        (3, 1, 8, 1, 64, 200),
        (2, 4, 2, 3, 8, 150),
        (1, 8, 1, 4, 128, 700),
        (2, 3, 3, 1, 24, 65),
        (1, 20, 1, 1, 40, 90),
    ],
)
def test_against_float64(device, dtype, shared, batch, new, kv_heads, group, dim, cache):
    inputs = case(
        batch=batch, new=new, kv_heads=kv_heads, group=group, dim=dim, cache=cache, dtype=dtype, shared=shared
    )
    check(device, *inputs)
    check(device, *inputs, attend_current=False, scale=0.02, stick_epsilon=0.0)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    new=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 6),
    dim=st.integers(1, 20).map(lambda n: 8 * n),
    cache=st.integers(9, 400),
    shared=st.booleans(),
    attend_current=st.booleans(),
    masked=st.booleans(),
    scale=st.floats(0, 0.3),
    seed=st.integers(0, 2**16),
)
def test_any_shape(batch, new, kv_heads, group, dim, cache, shared, attend_current, masked, scale, seed):
    inputs = case(
        batch=batch,
        new=new,
        kv_heads=kv_heads,
        group=group,
        dim=dim,
        cache=cache,
        shared=shared,
        dtype=torch.float64,
        seed=seed,
    )
    mask = torch.rand(batch, cache, generator=torch.Generator().manual_seed(seed)) < 0.7 if masked else None
    check(CPU, *inputs, attend_current=attend_current, scale=scale, key_padding_mask=mask)


EXACT = [torch.float64, torch.float32]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("attend_current", [True, False])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 16, 17, 64, 65, 128])
def test_lengths_from_nothing_on(device, dtype, length, attend_current):
    inputs = case(new=3, cache=128, dtype=dtype, lengths=[length, 128])
    check(device, *inputs, attend_current=attend_current)
    if length == 0:
        out, remainder = decode(device, *inputs)
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert torch.equal(remainder[0], torch.ones_like(remainder[0]))


@pytest.mark.parametrize("dtype", EXACT)
def test_token_by_token_equals_one_pass(device, dtype):
    q, k, v, _ = case(new=150, cache=150, dtype=dtype, lengths=[150, 150])
    whole, remainder = reference.stick_attention(q.double(), k.double(), v.double(), return_remainder=True)
    k_cache, v_cache = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    bound = ROUNDING[dtype]
    start = 0
    for new in (1, 1, 5, 1, 60, 1, 81):
        end = start + new
        k_cache[:, start:end], v_cache[:, start:end] = k[:, start:end], v[:, start:end]
        lengths = torch.full((2,), end, dtype=torch.int32)
        out, left = decode(device, q[:, start:end], k_cache, v_cache, lengths)
        torch.testing.assert_close(out.double(), whole[:, start:end], rtol=bound, atol=bound / 10)
        atol = 1e-300 if dtype == torch.float64 else 2**-23
        torch.testing.assert_close(left.double(), remainder[:, start:end], rtol=bound, atol=atol)
        start = end


@pytest.mark.parametrize("dtype", EXACT)
def test_masked_keys_take_no_stick(device, dtype):
    q, k, v, lengths = case(cache=200, dtype=dtype, lengths=[200, 180])
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, :77] = False  # left padding, over whole tiles
    mask[0, 150::3] = False
    mask[1] = False  # nothing is left
    check(device, q, k, v, lengths, key_padding_mask=mask)
    check(device, q, k, v, lengths, key_padding_mask=mask.t().contiguous().t())
    out, remainder = decode(device, q, k, v, lengths, key_padding_mask=mask)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(remainder[1], torch.ones_like(remainder[1]))


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("score", [30.0, -30.0, 89.0, -89.0, 1000.0, -1000.0])
def test_saturation(device, dtype, score):
    q, k, v, lengths = case(batch=1, kv_heads=1, group=1, dim=8, cache=40, dtype=dtype, lengths=[40])
    k.fill_(1)
    v.abs_()  # no cancellation, so that relative errors are those of the weights
    q.fill_(score / 8)[..., 1:] += torch.arange(7) - 3
    out, remainder = decode(device, q, k, v, lengths, scale=1.0)
    expected, expected_remainder = oracle(q, k, v, lengths, scale=1.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(remainder.double(), expected_remainder, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(("mean", "spread"), [(-18.0, 0.5), (-12.0, 1.0), (-9.0, 1.0)])
def test_long_tails_stay_exact(device, mean, spread):
    inputs = long_tail(16384, dim=8, mean=mean, spread=spread)
    check(device, *inputs, scale=1.0)
    for actual, expected in zip(decode(device, *inputs, scale=1.0), oracle(*inputs, scale=1.0), strict=True):
        assert (actual.double() - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("epsilon", [1e-2, 1e-4, 2**-24])
def test_early_exit_keeps_its_bound(device, dtype, epsilon):
    q, k, v, lengths = case(batch=1, kv_heads=1, group=4, dim=64, cache=4000, dtype=dtype, lengths=[4000])
    out, remainder = decode(device, q, k, v, lengths, stick_epsilon=epsilon)
    if dtype == torch.float64:
        (expected, expected_remainder), rounding = oracle(q, k, v, lengths), 0.0
    else:
        (expected, expected_remainder), rounding = decode(device, q, k, v, lengths, stick_epsilon=0.0), 1e-6
    assert (out - expected).abs().max() <= epsilon * v.abs().max() + rounding
    assert (remainder - expected_remainder).abs().max() <= epsilon


def test_early_exit_leaves_the_rest_of_the_cache_alone(device):
    q, k, v, lengths = case(batch=1, kv_heads=1, dim=64, cache=4000, lengths=[4000])
    expected, _ = decode(device, q, k, v, lengths)
    unread = 3900 if on_cuda(device) else 3000
    k[:, :unread], v[:, :unread] = torch.nan, torch.nan
    assert torch.equal(decode(device, q, k, v, lengths)[0], expected)
    assert decode(device, q, k, v, lengths, stick_epsilon=0.0)[0].isnan().any()


@pytest.mark.parametrize("tail", [2.0, 0.5, -1.0, -2.0, -5.0])
def test_threads_and_repetition_change_no_bit(device, tail, set_threads):
    """From sticks that end in the first split to sticks that never end; which split ends them must not matter."""
    q, k, v, lengths = case(batch=3, dim=64, cache=3000, lengths=[3000, 1, 1700])
    q[..., 0], k[..., 0] = 1.0, 8 * tail
    results = []
    for count in (1, 2, 3) if not on_cuda(device) else (torch.get_num_threads(),):
        set_threads(count)
        results += [decode(device, q, k, v, lengths) for _ in range(6 if on_cuda(device) else 20)]
    for out, remainder in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(remainder, results[0][1])
    check(device, q, k, v, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(device, dtype):
    q, k, v, lengths = case(new=3, group=3, dim=24, dtype=dtype)
    expected, _ = decode(device, q, k, v, lengths)
    routed = q.transpose(2, 3).contiguous().transpose(2, 3)
    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([v, v], -1)[..., : v.shape[-1]]
    assert torch.equal(decode(device, routed, heads_first, wide, lengths)[0], expected)
    if device.type == "cpu":  # moving to a GPU would make them contiguous
        crooked = torch.nn.functional.pad(k, (1, 2))[..., 1:-2]  # rows that start anywhere
        assert torch.equal(decode(device, q, crooked, v, lengths)[0], expected)
        for dim in range(3):
            for odd in ((spaced(q, dim), k, v), (q, spaced(k, dim), v), (q, k, spaced(v, dim))):
                assert torch.equal(decode(device, *odd, lengths)[0], expected)


def test_nan_in_a_visible_key_is_not_hidden(device):
    q, k, v, lengths = case(batch=1, cache=200, lengths=[200])
    k[0, 190] = torch.nan
    assert decode(device, q, k, v, lengths)[0].isnan().all()


def test_layouts_without_copies():
    q, k, v, lengths = case(batch=2, new=3, kv_heads=2, group=3, dim=16, dtype=torch.float64)
    expected, remainder = stick_attention_decode(q, k, v, lengths, return_remainder=True)
    flat, flat_remainder = stick_attention_decode(q.flatten(2, 3), k, v, lengths, return_remainder=True)
    assert torch.equal(flat.view_as(expected), expected)
    assert torch.equal(flat_remainder.view_as(remainder), remainder)

    routed = q.transpose(2, 3).contiguous().transpose(2, 3)  # [B, T, G, H, D] in memory: the routed layout
    out = stick_attention_decode(routed, k, v, lengths)
    assert out.stride() == routed.stride()
    assert torch.equal(out, expected)

    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([v, v], -1)[..., : v.shape[-1]]
    assert torch.equal(stick_attention_decode(q, heads_first, wide, lengths), expected)


def test_nothing_to_do():
    for batch, new in ((0, 1), (2, 0)):
        q, k, v, lengths = case(batch=batch, new=new)
        out, remainder = stick_attention_decode(q, k, v, lengths, return_remainder=True)
        assert out.shape == q.shape
        assert remainder.shape == q.shape[:-1]
    q, k, v, lengths = case(cache=0, new=0)
    assert torch.equal(stick_attention_decode(q.new_ones(2, 1, 4, 32), k, v, lengths), q.new_zeros(2, 1, 4, 32))


def broken(**changes):
    q, k, v, lengths = case()
    return {"q": q, "k_cache": k, "v_cache": v, "cache_lengths": lengths, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 32)}, r"q must be \[B, T, H_q, D\] or \[B, T, H_kv, G, D\], got shape \[2, 32\]"),
        ({"q": torch.zeros(2, 1, 4, 32).int()}, "q must be float32, float64, bfloat16 or float16, got Int"),
        ({"q": torch.zeros(2, 1, 4, 12)}, "q must have a head dim that is a multiple of 8 .* got 12"),
        ({"q": torch.zeros(2, 1, 4, 1032)}, "q must have a head dim .* got 1032"),
        ({"q": torch.zeros(2, 1, 32, 4).mT}, "q must be contiguous in its last dimension, got strides"),
        ({"q": torch.zeros(2, 1, 3, 32)}, "q must have a multiple of k_cache's 2 heads, got 3"),
        ({"q": torch.zeros(2, 1, 3, 2, 32)}, "q must have k_cache's 2 heads, got 3"),
        ({"k_cache": torch.zeros(2, 100, 32)}, "k_cache must have 4 dimensions, got shape"),
        ({"k_cache": torch.zeros(3, 100, 2, 32)}, "k_cache must have q's batch size 2, got shape"),
        ({"k_cache": torch.zeros(2, 100, 2, 64)}, "k_cache must have q's head dimension 32, got shape"),
        ({"k_cache": torch.zeros(2, 100, 2, 32).double()}, "k_cache must have the dtype of q .* got Double"),
        ({"k_cache": torch.zeros(2, 100, 32, 2).mT}, "k_cache must be contiguous in its last dimension"),
        ({"k_cache": torch.zeros(2, 100, 0, 32), "v_cache": None}, "k_cache must have at least one head"),
        ({"v_cache": torch.zeros(2, 99, 2, 32)}, r"v_cache must have k_cache's shape \[2, 100, 2, 32\], got shape"),
        ({"cache_lengths": torch.tensor([1, 2])}, "cache_lengths must be int32, got Long"),
        ({"cache_lengths": torch.tensor([1], dtype=torch.int32)}, "cache_lengths must hold one length for each"),
        (
            {"cache_lengths": torch.tensor([1, 101], dtype=torch.int32)},
            r"must lie in \[0, S_max\], got 101 at index",
        ),
        ({"cache_lengths": torch.tensor([-1, 5], dtype=torch.int32)}, "got -1 at index 0"),
        ({"key_padding_mask": torch.ones(2, 100)}, "key_padding_mask must be bool, got Float"),
        ({"key_padding_mask": torch.ones(2, 99).bool()}, r"key_padding_mask must be \[B, S_max\] = \[2, 100\]"),
        ({"scale": math.inf}, "scale must be finite in float32, got inf"),
        ({"q": torch.zeros(2, 1, 4, 32, requires_grad=True)}, "q must not require grad: this op has no backward"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=f"stick_attention_decode: .*{message}"):
        stick_attention_decode(**broken(**changes))


def test_parameters_are_welcome_without_grad_mode():
    q, k, v, lengths = case()
    with torch.no_grad():
        out = stick_attention_decode(q.requires_grad_(), k, v, lengths)
    assert not out.requires_grad


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared):
    q, k, v, lengths = case(new=2, shared=shared)
    mask = torch.ones(2, 100, dtype=torch.bool)
    op = torch.ops.moduleformer_ext.stick_attention_decode.default
    torch.library.opcheck(op, (q, k, v, lengths))
    torch.library.opcheck(op, (q.flatten(2, 3), k, v, lengths, 0.1, False, mask, 0.0))


def test_compiles_to_one_graph():
    def decode(q, k, v, lengths):
        return stick_attention_decode(q * 2, k, v, lengths, return_remainder=True)

    inputs = case()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for actual, expected in zip(compiled(*inputs), decode(*inputs), strict=True):
            assert torch.equal(actual, expected)


def test_autocast_goes_by_the_cache():
    q, k, v, lengths = case(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = stick_attention_decode(q.float(), k, v, lengths)
    assert torch.equal(out, stick_attention_decode(q, k, v, lengths))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    code = (
        "import torch, decode_cases as t\n"
        "for dtype in t.DTYPES:\n"
        "    for dim in (8, 40, 64):\n"
        "        t.check(torch.device('cpu'), *t.case(new=2, group=3, dim=dim, cache=200, dtype=dtype))\n"
    )
    run_with({"MFX_CPU_ISA": isa}, code)
