"""The cache is NaN wherever no key was written, so that reading too far shows."""

import pytest
import torch

from moduleformer_ext import reference
from moduleformer_ext._extension import build_info
from moduleformer_ext.ops import stick_attention_decode

EMULATED = build_info()["cuda_dispatch"] == "CPU"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# By norm: float32 to accumulated rounding, the others to half a unit of their last place.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


def case(
    *, batch=2, new=1, kv_heads=2, group=2, dim=32, cache=100, dtype=torch.float32, shared=False, lengths=None, seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q = randn(batch, new, kv_heads, group, dim)
    k = randn(batch, cache, kv_heads, dim)
    v = None if shared else randn(batch, cache, kv_heads, dim)
    if lengths is None:
        lengths = torch.randint(new, cache + 1, (batch,), generator=generator)
    lengths = torch.as_tensor(lengths, dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        for tensor in (k, v):
            if tensor is not None:
                tensor[b, length:] = torch.nan
    return q, k, v, lengths


def long_tail(keys, dim=64, dtype=torch.float32, mean=-9.0, **sizes):
    """Logits (with scale 1) around `mean`: sticks that hardly shrink."""
    q, k, v, lengths = case(batch=1, kv_heads=1, cache=keys, dim=dim, dtype=dtype, lengths=[keys], **sizes)
    q.zero_()[..., 0] = 1
    k[..., 0] += mean
    return q, k, v, lengths


def decode(device, q, k, v, lengths, *, key_padding_mask=None, **options):
    mask = None if key_padding_mask is None else key_padding_mask.to(device)
    v = None if v is None else v.to(device)
    out, remainder = stick_attention_decode(
        q.to(device),
        k.to(device),
        v,
        lengths.to(device),
        key_padding_mask=mask,
        return_remainder=True,
        **options,
    )
    return out.cpu(), remainder.cpu()


def check(device, q, k, v, lengths, **options):
    out, remainder = decode(device, q, k, v, lengths, **options)
    expected, expected_remainder = reference.stick_attention_decode(
        q.double(),
        k.double(),
        None if v is None else v.double(),
        lengths,
        **{**options, "stick_epsilon": 0.0, "return_remainder": True},
    )
    assert out.dtype == q.dtype
    assert remainder.dtype == torch.float32
    assert not out.isnan().any()
    assert (out.double() - expected).norm() <= TOLERANCE[q.dtype] * expected.norm()
    torch.testing.assert_close(remainder.double(), expected_remainder, rtol=2e-5, atol=2**-23)


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


@pytest.mark.parametrize("shared", [False, True])
def test_under_any_schedule(device, schedule, shared):
    check(device, *case(new=3, dim=128, cache=500, dtype=torch.bfloat16, shared=shared), stick_epsilon=0.0)
    check(device, *case(kv_heads=1, dim=1024, cache=300, dtype=torch.bfloat16, shared=shared), scale=0.02)


@pytest.mark.parametrize("attend_current", [True, False])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 16, 64, 65, 128])
def test_lengths_from_nothing_on(device, length, attend_current):
    inputs = case(new=3, cache=128, lengths=[length, 128])
    check(device, *inputs, attend_current=attend_current)
    if length == 0:
        out, remainder = decode(device, *inputs)
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert torch.equal(remainder[0], torch.ones_like(remainder[0]))


def test_token_by_token_equals_one_pass(device):
    q, k, v, _ = case(new=150, cache=150, lengths=[150, 150])
    whole, remainder = reference.stick_attention(q.double(), k.double(), v.double(), return_remainder=True)
    k_cache, v_cache = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    start = 0
    for new in (1, 1, 5, 1, 60, 1, 81):
        end = start + new
        k_cache[:, start:end], v_cache[:, start:end] = k[:, start:end], v[:, start:end]
        lengths = torch.full((2,), end, dtype=torch.int32)
        out, left = decode(device, q[:, start:end], k_cache, v_cache, lengths)
        torch.testing.assert_close(out.double(), whole[:, start:end], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(left.double(), remainder[:, start:end], rtol=1e-5, atol=2**-23)
        start = end


def test_masked_keys_take_no_stick(device):
    q, k, v, lengths = case(cache=200, lengths=[200, 180])
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, :77] = False
    mask[0, 150::3] = False
    mask[1] = False  # nothing is left
    check(device, q, k, v, lengths, key_padding_mask=mask)
    check(device, q, k, v, lengths, key_padding_mask=mask.t().contiguous().t())
    out, remainder = decode(device, q, k, v, lengths, key_padding_mask=mask)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(remainder[1], torch.ones_like(remainder[1]))


@pytest.mark.parametrize("score", [30.0, -30.0, 89.0, -89.0, 1000.0, -1000.0])
def test_saturation(device, score):
    q, k, v, lengths = case(batch=1, kv_heads=1, dim=8, cache=40, lengths=[40])
    k.fill_(1)
    q.fill_(score / 8)[..., 1:] += torch.arange(7) - 3
    out, remainder = decode(device, q, k, v, lengths, scale=1.0)
    expected = reference.stick_attention_decode(
        q.double(), k.double(), v.double(), lengths, scale=1.0, stick_epsilon=0.0, return_remainder=True
    )
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(remainder.double(), expected[1], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("mean", [-18.0, -9.0])
def test_long_tails_stay_exact(device, mean):
    check(device, *long_tail(16384, dim=8, mean=mean), scale=1.0)


@pytest.mark.parametrize("epsilon", [1e-2, 2**-24])
def test_early_exit_keeps_its_bound(device, epsilon):
    q, k, v, lengths = case(batch=1, kv_heads=1, group=4, dim=64, cache=2000, lengths=[2000])
    out, remainder = decode(device, q, k, v, lengths, stick_epsilon=epsilon)
    expected, expected_remainder = decode(device, q, k, v, lengths, stick_epsilon=0.0)
    assert (out - expected).abs().max() <= epsilon * v.abs().max() + 1e-6
    assert (remainder - expected_remainder).abs().max() <= epsilon


def test_early_exit_leaves_the_rest_of_the_cache_alone(device):
    q, k, v, lengths = case(batch=1, kv_heads=1, dim=64, cache=4000, lengths=[4000])
    expected, _ = decode(device, q, k, v, lengths)
    k[:, :3900], v[:, :3900] = torch.nan, torch.nan
    assert torch.equal(decode(device, q, k, v, lengths)[0], expected)
    assert decode(device, q, k, v, lengths, stick_epsilon=0.0)[0].isnan().any()


@pytest.mark.parametrize("tail", [0.5, -1.0, -5.0])
def test_same_bits_every_time(device, tail):
    """From sticks that end in the newest keys to sticks that never end."""
    q, k, v, lengths = case(batch=3, dim=64, cache=3000, lengths=[3000, 1, 1700])
    q[..., 0], k[..., 0] = 1.0, 8 * tail
    first = decode(device, q, k, v, lengths)
    for _ in range(5):
        again = decode(device, q, k, v, lengths)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])
    check(device, q, k, v, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(device, dtype):
    q, k, v, lengths = case(new=3, group=3, dim=24, dtype=dtype)
    expected, _ = decode(device, q, k, v, lengths)
    routed = q.transpose(2, 3).contiguous().transpose(2, 3)
    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(decode(device, routed, heads_first, v, lengths)[0], expected)
    if device.type == "cpu":  # moving to a GPU would make them contiguous
        crooked = torch.nn.functional.pad(k, (1, 2))[..., 1:-2]  # rows that start anywhere
        assert torch.equal(decode(device, q, crooked, v, lengths)[0], expected)


def test_nan_in_a_visible_key_is_not_hidden(device):
    q, k, v, lengths = case(batch=1, cache=200, lengths=[200])
    k[0, 190] = torch.nan
    assert decode(device, q, k, v, lengths)[0].isnan().all()


def test_float64_is_for_the_cpu(device):
    q, k, v, lengths = case()
    with pytest.raises(ValueError, match="stick_attention_decode: q must be float32, bfloat16 or float16"):
        decode(device, q.double(), k.double(), v.double(), lengths)


@pytest.mark.skipif(not EMULATED, reason="counts are the emulator's")
class TestCounts:
    @staticmethod
    def launches(device, inputs, **options):
        import cudasim

        cudasim.reset_stats()
        decode(device, *inputs, scale=1.0, **options)
        return cudasim.stats()

    @staticmethod
    def traffic(launches):
        return 32 * sum(launch["global_load_sectors"] + launch["global_store_sectors"] for launch in launches)

    @pytest.mark.parametrize(
        ("kv_heads", "group", "dim", "cache", "shared"),
        [(8, 1, 64, 4096, False), (8, 2, 64, 4096, False), (8, 2, 128, 4096, False), (1, 2, 1024, 65536, True)],
    )
    def test_reads_the_cache_once(self, device, kv_heads, group, dim, cache, shared):
        q, k, v, lengths = case(
            batch=1,
            kv_heads=kv_heads,
            group=group,
            dim=dim,
            cache=cache,
            dtype=torch.bfloat16,
            shared=shared,
            lengths=[cache],
        )
        launches = self.launches(device, (q, k, v, lengths), stick_epsilon=0.0)
        assert len(launches) == 2
        assert self.traffic(launches) <= 1.1 * k.nbytes * (1 if shared else 2)
        for launch in launches:
            assert launch["shared_excess_wavefronts"] <= 0.2 * launch["shared_wavefronts"]

    def test_sticks_that_end_leave_the_cache_unread(self, device):
        q, k, v, lengths = case(
            batch=1, kv_heads=1, dim=1024, cache=8192, dtype=torch.bfloat16, shared=True, lengths=[8192]
        )
        launches = self.launches(device, (q / 32, k, v, lengths))
        assert self.traffic(launches) <= 2 * 64 * 1024 * 2
