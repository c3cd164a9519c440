import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moduleformer_ext import reference
from moduleformer_ext.ops import stick_attention_decode

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Error of the output by norm: float64 to rounding, float32 to accumulated rounding, the others to half a unit of
# their last place (the arithmetic inside is float32).
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


def case(
    *, batch=2, new=1, kv_heads=2, group=2, dim=32, cache=100, dtype=torch.float32, shared=False, lengths=None, seed=0
):
    """Inputs whose cache is NaN wherever no key has been written."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q = randn(batch, new, kv_heads, group, dim)
    k = randn(batch, cache, kv_heads, dim)
    v = None if shared else randn(batch, cache, kv_heads, dim)
    if lengths is None:
        lengths = torch.randint(new, cache + 1, (batch,), generator=generator)
    lengths = torch.as_tensor(lengths, dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        k[b, length:] = torch.nan
        if v is not None:
            v[b, length:] = torch.nan
    return q, k, v, lengths


def oracle(q, k, v, lengths, **options):
    options = {**options, "stick_epsilon": 0.0, "return_remainder": True}
    v = None if v is None else v.double()
    return reference.stick_attention_decode(q.double(), k.double(), v, lengths, **options)


def relative_error(actual, expected):
    error = (actual.double() - expected.double()).norm()
    return (error / expected.double().norm().clamp_min(1e-30)).item()


def check(q, k, v, lengths, **options):
    out, remainder = stick_attention_decode(q, k, v, lengths, return_remainder=True, **options)
    expected, expected_remainder = oracle(q, k, v, lengths, **options)
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    assert remainder.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert remainder.shape == q.shape[:-1]
    assert not out.isnan().any()
    assert relative_error(out, expected) <= TOLERANCE[q.dtype]
    torch.testing.assert_close(remainder.double(), expected_remainder, rtol=CLOSE[q.dtype], atol=2**-23)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("batch", "new", "kv_heads", "group", "dim", "cache"),
    [
        (1, 1, 1, 2, 1024, 300),
        (1, 1, 1, 4, 1000, 130),
        (3, 1, 8, 1, 64, 200),
        (2, 4, 2, 3, 8, 150),
        (1, 8, 1, 4, 128, 700),
        (2, 3, 3, 1, 24, 65),
        (1, 20, 1, 1, 40, 90),
    ],
)
def test_against_float64(dtype, shared, batch, new, kv_heads, group, dim, cache):
    inputs = case(
        batch=batch, new=new, kv_heads=kv_heads, group=group, dim=dim, cache=cache, dtype=dtype, shared=shared
    )
    check(*inputs)
    check(*inputs, attend_current=False, scale=0.02, stick_epsilon=0.0)


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
    check(*inputs, attend_current=attend_current, scale=scale, key_padding_mask=mask)


@pytest.mark.parametrize("attend_current", [True, False])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 16, 17, 64, 65, 128])
def test_lengths_from_nothing_on(length, attend_current):
    q, k, v, lengths = case(new=3, cache=128, dtype=torch.float64, lengths=[length, 128])
    check(q, k, v, lengths, attend_current=attend_current)
    if length == 0:
        out, remainder = stick_attention_decode(q, k, v, lengths, return_remainder=True)
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert torch.equal(remainder[0], torch.ones_like(remainder[0]))


def test_token_by_token_equals_one_pass():
    q, k, v, _ = case(batch=2, new=150, cache=150, dtype=torch.float64, lengths=[150, 150])
    whole, remainder = reference.stick_attention(q, k, v, return_remainder=True)
    k_cache, v_cache = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    start = 0
    for new in (1, 1, 5, 1, 60, 1, 81):
        end = start + new
        k_cache[:, start:end], v_cache[:, start:end] = k[:, start:end], v[:, start:end]
        lengths = torch.full((2,), end, dtype=torch.int32)
        out, left = stick_attention_decode(q[:, start:end], k_cache, v_cache, lengths, return_remainder=True)
        torch.testing.assert_close(out, whole[:, start:end], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(left, remainder[:, start:end], rtol=1e-12, atol=1e-300)
        start = end


def test_masked_keys_take_no_stick():
    q, k, v, lengths = case(batch=2, cache=200, dtype=torch.float64, lengths=[200, 180])
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, :77] = False  # left padding, over whole tiles
    mask[1] = False  # nothing is left
    check(q, k, v, lengths, key_padding_mask=mask)
    out, remainder = stick_attention_decode(q, k, v, lengths, key_padding_mask=mask, return_remainder=True)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(remainder[1], torch.ones_like(remainder[1]))
    check(q, k, v, lengths, key_padding_mask=mask.t().contiguous().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [30.0, -30.0, 89.0, -89.0, 1000.0, -1000.0])
def test_saturation(dtype, score):
    k = torch.ones(1, 40, 1, 8, dtype=dtype)
    v = torch.randn(1, 40, 1, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    q = torch.full((1, 1, 1, 8), score / 8, dtype=dtype)
    q[..., 1:] += torch.arange(7) - 3
    lengths = torch.tensor([40], dtype=torch.int32)
    out, remainder = stick_attention_decode(q, k, v, lengths, scale=1.0, return_remainder=True)
    expected, expected_remainder = oracle(q, k, v, lengths, scale=1.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(remainder.double(), expected_remainder, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(("mean", "spread"), [(-18.0, 0.5), (-12.0, 1.0), (-9.0, 1.0)])
def test_long_tails_stay_exact(mean, spread):
    keys = 16384
    generator = torch.Generator().manual_seed(0)
    k = torch.zeros(1, keys, 1, 8)
    k[..., 0] = mean + spread * torch.randn(keys, generator=generator)[:, None]
    v = torch.rand(1, keys, 1, 8, generator=generator)
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1
    lengths = torch.tensor([keys], dtype=torch.int32)
    out, remainder = stick_attention_decode(q, k, v, lengths, scale=1.0, return_remainder=True)
    expected, expected_remainder = oracle(q, k, v, lengths, scale=1.0)
    assert relative_error(out, expected) < 2e-6
    assert relative_error(remainder, expected_remainder) < 2e-6


@pytest.mark.parametrize("epsilon", [1e-2, 1e-4, 2**-24])
def test_early_exit_keeps_its_bound(epsilon):
    q, k, v, lengths = case(batch=1, kv_heads=1, group=4, dim=64, cache=4000, dtype=torch.float64, lengths=[4000])
    out, remainder = stick_attention_decode(q, k, v, lengths, stick_epsilon=epsilon, return_remainder=True)
    expected, expected_remainder = oracle(q, k, v, lengths)
    assert (out - expected).abs().max() <= epsilon * v.abs().max()
    assert (remainder - expected_remainder).abs().max() <= epsilon


def test_early_exit_leaves_the_rest_of_the_cache_alone():
    q, k, v, lengths = case(batch=1, kv_heads=1, group=2, dim=64, cache=4000, lengths=[4000])
    expected = stick_attention_decode(q, k, v, lengths)
    k[:, :3000] = torch.nan
    v[:, :3000] = torch.nan
    assert torch.equal(stick_attention_decode(q, k, v, lengths), expected)
    assert stick_attention_decode(q, k, v, lengths, stick_epsilon=0.0).isnan().any()


@pytest.mark.parametrize("tail", [2.0, -2.0, -5.0])
def test_threads_and_repetition_change_no_bit(tail):
    """From sticks that end in the first split to sticks that never end; which split ends them must not matter."""
    q, k, v, lengths = case(batch=3, kv_heads=2, group=2, dim=64, cache=3000, lengths=[3000, 1, 1700])
    q[..., 0], k[..., 0] = 1.0, 8 * tail
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(20):
                results.append(stick_attention_decode(q, k, v, lengths, return_remainder=True))
    finally:
        torch.set_num_threads(threads)
    for out, remainder in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(remainder, results[0][1])
    check(q, k, v, lengths)


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


def test_nan_in_a_visible_key_is_not_hidden():
    q, k, v, lengths = case(batch=1, cache=50, lengths=[50])
    k[0, 45] = torch.nan
    assert stick_attention_decode(q, k, v, lengths).isnan().all()


def broken(**changes):
    q, k, v, lengths = case()
    return {"q": q, "k_cache": k, "v_cache": v, "cache_lengths": lengths, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 32)}, r"q must be \[B, T, H_q, D\] or \[B, T, H_kv, G, D\], got shape \[2, 32\]"),
        ({"q": torch.zeros(2, 1, 4, 32).int()}, "q must be float32, float64, bfloat16 or float16, got Int"),
        (
            {"q": torch.zeros(2, 1, 4, 12)},
            "q must have a head dimension that is a multiple of 8 .* got 12",
        ),
        ({"q": torch.zeros(2, 1, 4, 1032)}, "q must have a head dimension .* got 1032"),
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
        ({"stick_epsilon": -0.1}, r"stick_epsilon must lie in \[0, 1\), got -0.1"),
        ({"stick_epsilon": math.nan}, r"stick_epsilon must lie in \[0, 1\), got nan"),
        ({"q": torch.zeros(2, 1, 4, 32, requires_grad=True)}, "q must not require grad: decoding has no backward"),
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
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n" + (
        "import test_stick_attention_decode as t\n"
        "for dtype in t.DTYPES:\n"
        "    for dim in (8, 40, 64):\n"
        "        t.check(*t.case(new=2, group=3, dim=dim, cache=200, dtype=dtype))\n"
    )
    environment = {**os.environ, "MFX_CPU_ISA": isa}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if "within what this processor has" in result.stderr:
        pytest.skip(f"{isa} is not available here")
    assert result.returncode == 0, result.stderr
