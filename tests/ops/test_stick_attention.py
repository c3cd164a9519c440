import math

import pytest
import torch
from stick_cases import NAMES, check_values_at_the_keys_address, inputs, relative_error

from moduleformer_ext import reference
from moduleformer_ext.ops import stick_attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def run(function, q, k, v, *, dtype=None, with_remainder_grad=True, **options):
    """Outputs and gradients of a fixed random functional of them."""
    leaves = [t.to(dtype or t.dtype, copy=True).requires_grad_() for t in (q, k, v) if t is not None]
    o, remainder = function(*leaves, **({} if v is not None else {"v": None}), return_remainder=True, **options)
    generator = torch.Generator().manual_seed(99)
    grad_o = torch.randn(o.shape, generator=generator, dtype=torch.float64)
    grad_r = torch.randn(remainder.shape, generator=generator, dtype=torch.float64)
    if not with_remainder_grad:
        grad_r = torch.zeros_like(grad_r)
    # Rounded to q's type in every run, so that all runs differentiate the same functional.
    grad_o = grad_o.to(q.dtype)
    loss = (o * grad_o.to(o.dtype)).sum(dtype=torch.float64) + (remainder * grad_r.to(remainder.dtype)).sum()
    return [o.detach(), remainder.detach(), *torch.autograd.grad(loss, leaves)]


def check(q, k, v, *, factor=2.0, floor=0.0, **options):
    exact_options = {name: value for name, value in options.items() if name != "stick_epsilon"}
    exact = run(reference.stick_attention, q, k, v, dtype=torch.float64, **exact_options)
    peer = run(reference.stick_attention, q, k, v, **exact_options)
    for name, ours, theirs, truth in zip(NAMES, run(stick_attention, q, k, v, **options), peer, exact, strict=False):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        rounded, slack = max(floor, FLOOR[q.dtype]), 0.0
        if name == "remainder" and q.dtype != torch.float64:
            rounded, slack = FLOOR[torch.float32], 2**-24  # the default stick_epsilon
        assert relative_error(ours, truth, slack) <= factor * relative_error(theirs, truth) + rounded, name


SHAPES = [  # batch, t_q, t_k, heads, group, dim, shared
    (2, 64, 64, 2, 1, 64, False),
    (1, 65, 193, 2, 3, 8, False),
    (1, 1, 130, 3, 1, 24, False),
    (2, 9, 9, 1, 5, 40, True),
    (1, 150, 150, 1, 2, 256, False),
    (1, 40, 100, 1, 2, 1024, True),
    (1, 300, 333, 1, 1, 72, True),
    (1, 1, 1, 1, 1, 16, False),
    (1, 200, 200, 1, 7, 16, False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"stick_epsilon": 0.0, "attend_current": False, "scale": -0.3}])
def test_against_the_reference(dtype, shape, options):
    *sizes, shared = shape
    check(*inputs(*sizes, dtype, shared=shared), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [-18.0, -9.0, -4.0, 0.0, 6.0])
def test_long_rows(dtype, mean):
    # At mean -9 the sum of a row's thousand small weights must not be lost; at 0 what rounding leaves of delta must not
    # reach the thousand keys behind the end of the stick.
    # At 6 every gradient has a factor of 1/400, but rounding is relative to the sums it is the difference of.
    q, k, v = inputs(1, 96, 1500, 1, 1, 64, dtype, mean=mean, gain=0.5)
    floor = 4e-5 if mean > 0 else 0.0
    check(q, k, v, stick_epsilon=0.0, floor=floor)
    check(q, k, v, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [30.0, 87.0, 88.5, 90.0, 1000.0])
def test_saturation(dtype, size):
    # Every logit is +-size: whole rows of keys that take everything or nothing.
    generator = torch.Generator().manual_seed(1)
    t, dim = 80, 16
    sign = torch.randint(0, 2, (1, t, 1, 1), generator=generator) * 2 - 1
    q = torch.full((1, t, 1, dim), 1.0, dtype=dtype)
    k = (sign * size / dim).expand(1, t, 1, dim).to(dtype)
    v = torch.randn(1, t, 1, dim, generator=generator).to(dtype)
    for scale in (1.0, -1.0):
        exact = run(reference.stick_attention, q, k, v, dtype=torch.float64, scale=scale)
        for name, ours, truth in zip(NAMES, run(stick_attention, q, k, v, scale=scale), exact, strict=True):
            assert torch.isfinite(ours).all(), name
            assert (ours.double() - truth).abs().max() <= FLOOR[dtype] * max(1.0, truth.abs().max().item()), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2])
def test_key_padding(dtype, group):
    q, k, v = inputs(3, 100, 170, 2, group, 32, dtype)
    keep = torch.rand(3, 170, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[1, :140] = False  # whole tiles
    keep[2] = False
    check(q, k, v, key_padding_mask=keep)
    check(q, k, v, key_padding_mask=keep, attend_current=False, stick_epsilon=0.0)
    check(q, k, v, key_padding_mask=torch.ones_like(keep))
    o, remainder, dq, dk, dv = run(stick_attention, q, k, v, key_padding_mask=keep)
    assert torch.equal(o[2], torch.zeros_like(o[2]))
    assert torch.equal(remainder[2], torch.ones_like(remainder[2]))
    assert torch.equal(dq[2], torch.zeros_like(dq[2]))
    assert not dk[~keep].any()
    assert not dv[~keep].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouped", [False, True])
def test_packed_sequences_equal_single_ones(dtype, grouped):
    lengths_q, lengths_k = [5, 0, 130, 64, 1, 0], [9, 0, 130, 200, 1, 7]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths_q, lengths_k))
    q, k, v = (t[0] for t in inputs(1, sum(lengths_q), sum(lengths_k), 2, 2, 16, dtype))
    if grouped:
        q = q.unflatten(1, (2, 2))
    whole = run(stick_attention, q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for i in range(len(lengths_q)):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        o, remainder = stick_attention(q[None, rows], k[None, keys], v[None, keys], return_remainder=True)
        assert relative_error(whole[0][rows], o[0]) < FLOOR[dtype]
        assert relative_error(whole[1][rows], remainder[0]) < FLOOR[torch.float32]
    check(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    check(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, attend_current=False, stick_epsilon=0.0)


def test_packed_with_one_set_of_lengths():
    cu = torch.tensor([0, 3, 20], dtype=torch.int32)
    q, k, v = (t[0] for t in inputs(1, 20, 20, 1, 2, 8, torch.float32))
    both = stick_attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert torch.equal(stick_attention(q, k, v, cu_seqlens_q=cu), both)


def test_history_equals_one_long_pass():
    q, k, v = inputs(2, 200, 200, 2, 1, 32, torch.float32)
    whole, left = stick_attention(q, k, v, return_remainder=True)
    for new in (1, 17, 64, 100):
        o, remainder = stick_attention(q[:, -new:], k, v, return_remainder=True)
        assert relative_error(o, whole[:, -new:]) < 1e-6
        torch.testing.assert_close(remainder, left[:, -new:], atol=2**-24, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_need_no_copy_and_come_back(dtype):
    batch, t, heads, group, dim = 2, 70, 3, 2, 16
    generator = torch.Generator().manual_seed(5)
    routed = torch.randn(batch, t, group, heads, dim, generator=generator).to(dtype)
    q = routed.transpose(2, 3)  # [B, T, H, G, D]
    packed_kv = torch.randn(batch, t, 2, heads, dim, generator=generator).to(dtype)
    k, v = packed_kv.unbind(2)
    o, remainder = stick_attention(q, k, v, return_remainder=True)
    assert o.shape == q.shape
    assert o.stride() == q.stride()
    assert remainder.shape == (batch, t, heads, group)
    plain, left = stick_attention(q.flatten(2, 3).contiguous(), k.contiguous(), v.contiguous(), return_remainder=True)
    assert torch.equal(o.flatten(2, 3), plain)
    assert torch.equal(remainder.flatten(2, 3), left)
    # Head-major tensors, an expanded one, one whose last dimension is not contiguous.
    major = q.flatten(2, 3).transpose(1, 2).contiguous().transpose(1, 2)
    assert stick_attention(major, k, v).stride() == major.stride()
    assert torch.equal(stick_attention(major, k, v), plain)
    one_head = k[:, :, :1].expand(-1, -1, heads, -1)
    assert torch.equal(stick_attention(q, one_head, v), stick_attention(q, one_head.contiguous(), v))
    odd = q.flatten(2, 3).transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(stick_attention(odd, k, v), plain)
    check(q, k, v)
    check(major, k, None)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 3, 4, 1, 2, 8), {}),
        ((1, 4, 4, 1, 1, 8), {"attend_current": False, "scale": 0.9}),
        ((1, 66, 70, 1, 1, 8), {"scale": 0.2}),
    ],
)
def test_gradcheck(sizes, options, shared):
    leaves = [t.requires_grad_() for t in inputs(*sizes, torch.float64, shared=shared) if t is not None]
    keep = torch.ones(1, sizes[2], dtype=torch.bool)
    keep[0, 1] = False
    for mask in (None, keep):

        def outputs(*leaves, mask=mask):
            return stick_attention(*leaves, return_remainder=True, key_padding_mask=mask, **options)

        assert torch.autograd.gradcheck(outputs, leaves, fast_mode=sizes[1] > 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [2.0**-24, 1e-3, 0.2])
def test_early_exit_keeps_its_promise(dtype, epsilon):
    q, k, v = inputs(1, 700, 700, 2, 1, 32, dtype)
    exact, left = stick_attention(q.double(), k.double(), v.double(), return_remainder=True)
    o, remainder = stick_attention(q, k, v, stick_epsilon=epsilon, return_remainder=True)
    rounding = (stick_attention(q, k, v, stick_epsilon=0.0).double() - exact).abs().max()
    assert (o.double() - exact).abs().max() <= epsilon * v.double().norm(dim=-1).max() + rounding * 1.01
    assert (remainder.double() - left).abs().max() <= epsilon + 1e-7
    op = torch.ops.moduleformer_ext.stick_attention_forward
    tiles = op(q, k, v, None, True, None, None, None, epsilon, False)[3]
    all_tiles = op(q, k, v, None, True, None, None, None, 0.0, False)[3]
    assert (tiles[:, -1] > 0).all()
    assert not all_tiles.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 20])  # several tasks per head, and one
def test_gradients_after_early_exit(dtype, heads):
    q, k, v = inputs(1, 500, 520, heads, 1, 16, dtype)
    whole = run(stick_attention, q, k, v, stick_epsilon=0.0)
    for name, ours, theirs in zip(NAMES, run(stick_attention, q, k, v), whole, strict=True):
        assert relative_error(ours, theirs, 2**-24) < (1e-5 if dtype == torch.float32 else 1e-3), name


def test_nothing_to_do():
    for batch, t_q, t_k in [(0, 4, 4), (2, 0, 0), (2, 0, 5)]:
        q, k, v = inputs(batch, t_q, t_k, 2, 2, 16, torch.float32)
        o, remainder, dq, dk, dv = run(stick_attention, q, k, v)
        assert o.shape == dq.shape == q.shape
        assert remainder.shape == q.shape[:-1]
        assert not dk.any()
        assert not dv.any()
    o, remainder = stick_attention(
        *inputs(1, 1, 1, 1, 1, 8, torch.float32), attend_current=False, return_remainder=True
    )
    assert not o.any()
    assert (remainder == 1).all()
    empty = torch.zeros(1, dtype=torch.int32)
    nothing = torch.zeros(0, 2, 8)
    assert stick_attention(nothing, nothing, cu_seqlens_q=empty).shape == (0, 2, 8)


def test_not_a_number_is_not_hidden():
    q, k, v = inputs(1, 8, 8, 1, 1, 8, torch.float32)
    q[0, 4] = math.nan
    o = stick_attention(q, k, v)
    assert o[0, 4].isnan().all()
    assert not o[0, :4].isnan().any()


@pytest.mark.parametrize(("dim", "dtype"), [(32, torch.float32), (32, torch.bfloat16), (264, torch.bfloat16)])
def test_values_at_the_address_of_keys_are_not_keys(dim, dtype):
    q, k, _ = inputs(2, 20, 40, 2, 1, dim, dtype)
    check_values_at_the_keys_address(q, k)
