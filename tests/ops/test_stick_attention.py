import math

import pytest
import torch
from devices import on_cuda
from stick_cases import (
    CPU,
    DTYPES,
    FLOOR,
    NAMES,
    check,
    check_values_at_the_keys_address,
    floor_of,
    inputs,
    relative_error,
    run,
    strided_inputs,
)

from moduleformer_ext import ops, reference
from moduleformer_ext.ops import stick_attention

SHAPES = [  # batch, t_q, t_k, heads, group, dim, shared
    (2, 64, 64, 2, 1, 64, False),
    (1, 65, 193, 2, 3, 8, False),
    (1, 1, 130, 3, 1, 24, False),
    (2, 9, 9, 1, 5, 40, True),
    (1, 150, 150, 1, 2, 256, False),
    (1, 40, 100, 1, 2, 1024, True),
    (1, 300, 333, 1, 1, 72, True),
    (1, 1, 1, 1, 1, 16, False),
    (1, 100, 130, 1, 2, 128, False),
    (1, 70, 70, 1, 1, 200, False),
    (1, 33, 90, 1, 2, 256, True),
    (1, 200, 200, 1, 7, 16, False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"stick_epsilon": 0.0, "attend_current": False, "scale": -0.3}])
def test_against_the_reference(device, dtype, shape, options):
    *sizes, shared = shape
    if on_cuda(device) and sizes[-1] > 256:
        pytest.skip("other kernels: tests/cuda/test_stick_attention_wide_cuda.py")
    check(device, *inputs(*sizes, dtype, shared=shared), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [-18.0, -9.0, -4.0, 0.0, 6.0])
def test_long_rows(device, dtype, mean):
    # At mean -9 the sum of a row's thousand small weights must not be lost; at -4 what o loses stays in delta less
    # the sum of newer G; at 0 what rounding leaves of delta must not reach the thousand keys beyond the end of the
    # stick. At 6 every gradient has a factor of 1/400, but rounding is relative to the sums it is the difference of.
    t_q, t_k = (70, 1100) if on_cuda(device) else (96, 1500)
    q, k, v = inputs(1, t_q, t_k, 1, 1, 64, dtype, mean=mean, gain=0.5)
    floor = 4e-5 if mean > 0 else 0.0
    check(device, q, k, v, stick_epsilon=0.0, floor=floor)
    check(device, q, k, v, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [30.0, 63.0, 64.5, 87.0, 88.5, 90.0, 1000.0])
def test_saturation(device, dtype, size):
    # Every logit is +-size: whole rows of keys that take everything or nothing.
    generator = torch.Generator().manual_seed(1)
    t, dim = 80, 16
    sign = torch.randint(0, 2, (1, t, 1, 1), generator=generator) * 2 - 1
    q = torch.full((1, t, 1, dim), 1.0, dtype=dtype)
    k = (sign * size / dim).expand(1, t, 1, dim).to(dtype)
    v = torch.randn(1, t, 1, dim, generator=generator).to(dtype)
    for scale in (1.0, -1.0):
        exact = run(reference.stick_attention, q, k, v, dtype=torch.float64, scale=scale)
        ours = run(stick_attention, q, k, v, device=device, scale=scale)
        for name, value, truth in zip(NAMES, ours, exact, strict=True):
            assert torch.isfinite(value).all(), name
            summed = k if name == "dq" else v  # times what rounding leaves of weights that cancel
            bound = floor_of(dtype, device) * max(1.0, truth.abs().max().item(), summed.abs().max().item())
            assert (value.double() - truth).abs().max() <= bound, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2])
def test_key_padding(device, dtype, group):
    q, k, v = inputs(3, 100, 170, 1 if on_cuda(device) else 2, group, 32, dtype)
    keep = torch.rand(3, 170, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[1, :140] = False  # whole tiles
    keep[2] = False
    check(device, q, k, v, key_padding_mask=keep)
    check(device, q, k, v, key_padding_mask=keep, attend_current=False, stick_epsilon=0.0)
    check(device, q, k, v, key_padding_mask=torch.ones_like(keep))
    o, remainder, dq, dk, dv = run(stick_attention, q, k, v, device=device, key_padding_mask=keep)
    assert torch.equal(o[2], torch.zeros_like(o[2]))
    assert torch.equal(remainder[2], torch.ones_like(remainder[2]))
    assert torch.equal(dq[2], torch.zeros_like(dq[2]))
    assert not dk[~keep].any()
    assert not dv[~keep].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouped", [False, True])
def test_packed_sequences_equal_single_ones(device, dtype, grouped):
    lengths_q, lengths_k = [5, 0, 130, 64, 1, 0], [9, 0, 130, 200, 1, 7]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths_q, lengths_k))
    q, k, v = (t[0] for t in inputs(1, sum(lengths_q), sum(lengths_k), 2, 2, 16, dtype))
    if grouped:
        q = q.unflatten(1, (2, 2))
    whole = run(stick_attention, q, k, v, device=device, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for i in range(len(lengths_q)):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        single = [t.to(device) for t in (q[None, rows], k[None, keys], v[None, keys])]
        o, remainder = (t.cpu() for t in stick_attention(*single, return_remainder=True))
        assert relative_error(whole[0][rows], o[0]) < FLOOR[dtype]
        assert relative_error(whole[1][rows], remainder[0]) < FLOOR[torch.float32]
    check(device, q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    check(device, q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, attend_current=False, stick_epsilon=0.0)


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
    q, k, v = strided_inputs(dtype)
    o, remainder = stick_attention(q, k, v, return_remainder=True)
    assert o.shape == q.shape
    assert o.stride() == q.stride()
    assert remainder.shape == q.shape[:-1]
    plain, left = stick_attention(q.flatten(2, 3).contiguous(), k.contiguous(), v.contiguous(), return_remainder=True)
    assert torch.equal(o.flatten(2, 3), plain)
    assert torch.equal(remainder.flatten(2, 3), left)
    # Head-major tensors, an expanded one, one whose last dimension is not contiguous.
    major = q.flatten(2, 3).transpose(1, 2).contiguous().transpose(1, 2)
    assert stick_attention(major, k, v).stride() == major.stride()
    assert torch.equal(stick_attention(major, k, v), plain)
    one_head = k[:, :, :1].expand_as(k)
    assert torch.equal(stick_attention(q, one_head, v), stick_attention(q, one_head.contiguous(), v))
    odd = q.flatten(2, 3).transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(stick_attention(odd, k, v), plain)
    check(CPU, q, k, v)
    check(CPU, major, k, None)


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
def test_early_exit_keeps_its_promise(device, dtype, epsilon):
    t, heads = (400, 1) if on_cuda(device) else (700, 2)
    q, k, v = inputs(1, t, t, heads, 1, 32, dtype)
    exact, left = reference.stick_attention(q.double(), k.double(), v.double(), return_remainder=True)
    longest = v.double().norm(dim=-1).max()
    q, k, v = (x.to(device) for x in (q, k, v))
    o, remainder = (x.cpu() for x in stick_attention(q, k, v, stick_epsilon=epsilon, return_remainder=True))
    whole = (x.cpu().double() for x in stick_attention(q, k, v, stick_epsilon=0.0, return_remainder=True))
    rounding, rounding_left = ((x - y).abs().max() * 1.01 for x, y in zip(whole, (exact, left), strict=True))
    assert (o.double() - exact).abs().max() <= epsilon * longest + rounding
    assert (remainder.double() - left).abs().max() <= epsilon + min(rounding_left, 1e-6)
    op = torch.ops.moduleformer_ext.stick_attention_forward
    tiles = op(q, k, v, None, True, None, None, None, epsilon, False)[3]
    all_tiles = op(q, k, v, None, True, None, None, None, 0.0, False)[3]
    assert (tiles[:, -1] > 0).all()
    assert not all_tiles.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 20])  # several tasks per head of the CPU's, and one
def test_gradients_after_early_exit(device, dtype, heads):
    t = 300 if on_cuda(device) else 500
    q, k, v = inputs(1, t, t + 20, 2 if on_cuda(device) and heads > 2 else heads, 1, 16, dtype)
    whole = run(stick_attention, q, k, v, device=device, stick_epsilon=0.0)
    for name, ours, theirs in zip(NAMES, run(stick_attention, q, k, v, device=device), whole, strict=True):
        assert relative_error(ours, theirs, 2**-24) < (1e-5 if dtype == torch.float32 else 1e-3), name


def test_nothing_to_do(device):
    for batch, t_q, t_k in [(0, 4, 4), (2, 0, 0), (2, 0, 5)]:
        q, k, v = inputs(batch, t_q, t_k, 2, 2, 16, torch.float32)
        o, remainder, dq, dk, dv = run(stick_attention, q, k, v, device=device)
        assert o.shape == dq.shape == q.shape
        assert remainder.shape == q.shape[:-1]
        assert not dk.any()
        assert not dv.any()
    one = [x.to(device) for x in inputs(1, 1, 1, 1, 1, 8, torch.float32)]
    o, remainder = stick_attention(*one, attend_current=False, return_remainder=True)
    assert not o.any()
    assert (remainder == 1).all()
    empty = torch.zeros(1, dtype=torch.int32, device=device)
    nothing = torch.zeros(0, 2, 8, device=device)
    assert stick_attention(nothing, nothing, cu_seqlens_q=empty).shape == (0, 2, 8)


@pytest.mark.parametrize("stick_epsilon", [-0.5, 1.0, math.nan, math.inf])
@pytest.mark.parametrize("package", [ops, reference])
def test_an_epsilon_outside_0_to_1_is_refused(package, stick_epsilon):
    q, length = torch.randn(1, 3, 1, 8), torch.tensor([3], dtype=torch.int32)
    message = r"stick_epsilon must lie in \[0, 1\), got "
    with pytest.raises(ValueError, match=f"stick_attention: {message}"):
        package.stick_attention(q, q, q, stick_epsilon=stick_epsilon)
    with pytest.raises(ValueError, match=f"stick_attention_decode: {message}"):
        package.stick_attention_decode(q, q, q, length, stick_epsilon=stick_epsilon)


@pytest.mark.parametrize("stick_epsilon", [None, 0.0, 0.5])
def test_a_stick_that_is_nan_has_not_ended(device, stick_epsilon):
    # The walk goes on: the gradient of every key and value that the row sees says so, whatever the early exit.
    q, k, v = inputs(1, 1, 300, 1, 1, 16, torch.float32)
    k[0, -1] = math.nan
    for name, value in zip(
        NAMES, run(stick_attention, q, k, v, device=device, stick_epsilon=stick_epsilon), strict=True
    ):
        assert value.isnan().all(), name


def test_not_a_number_is_not_hidden(device):
    q, k, v = inputs(1, 8, 8, 1, 1, 8, torch.float32)
    q[0, 4] = math.nan
    o = stick_attention(*(x.to(device) for x in (q, k, v))).cpu()
    assert o[0, 4].isnan().all()
    assert not o[0, :4].isnan().any()


@pytest.mark.parametrize(("dim", "dtype"), [(32, torch.float32), (32, torch.bfloat16), (264, torch.bfloat16)])
def test_values_at_the_address_of_keys_are_not_keys(device, dim, dtype):
    q, k, _ = inputs(2, 20, 40, 2, 1, dim, dtype)
    check_values_at_the_keys_address(q.to(device), k.to(device))
