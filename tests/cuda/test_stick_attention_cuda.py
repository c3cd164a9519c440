"""The CUDA kernels of stick_attention against the plain-PyTorch twin in float64, with the twin in the op's own type as
the measure of what rounding costs."""

import math

import pytest
import torch
from stick_cases import NAMES, check_values_at_the_keys_address, inputs, relative_error
from tf32_settings import SETTINGS, tf32

from moduleformer_ext import reference
from moduleformer_ext.ops import stick_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def run(function, q, k, v, *, dtype=None, device="cpu", **options):
    """Outputs and gradients of a fixed random functional of them."""
    options = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    leaves = [t.to(device, dtype or t.dtype, copy=True).requires_grad_() for t in (q, k, v) if t is not None]
    o, remainder = function(*leaves, **({} if v is not None else {"v": None}), return_remainder=True, **options)
    generator = torch.Generator().manual_seed(99)
    grad_o = torch.randn(o.shape, generator=generator, dtype=torch.float64)
    grad_r = torch.randn(remainder.shape, generator=generator, dtype=torch.float64)
    # Rounded to q's type in every run, so that all runs differentiate the same functional.
    grad_o, grad_r = grad_o.to(q.dtype).to(device, o.dtype), grad_r.to(device, remainder.dtype)
    grads = torch.autograd.grad([o, remainder], leaves, [grad_o, grad_r])
    return [t.detach().cpu() for t in (o, remainder, *grads)]


def check(q, k, v, device, *, factor=2.0, floor=0.0, **options):
    exact_options = {name: value for name, value in options.items() if name != "stick_epsilon"}
    exact = run(reference.stick_attention, q, k, v, dtype=torch.float64, **exact_options)
    peer = run(reference.stick_attention, q, k, v, **exact_options)
    ours = run(stick_attention, q, k, v, device=device, **options)
    for name, value, theirs, truth in zip(NAMES, ours, peer, exact, strict=False):
        assert value.dtype == theirs.dtype
        assert value.shape == theirs.shape
        rounded, slack = max(floor, FLOOR[q.dtype]), 0.0
        if name == "remainder":
            rounded, slack = max(floor, FLOOR[torch.float32]), 2**-24  # the default stick_epsilon
        assert relative_error(value, truth, slack) <= factor * relative_error(theirs, truth) + rounded, name


SHAPES = [  # batch, t_q, t_k, heads, group, dim, shared
    (2, 64, 64, 2, 1, 64, False),
    (1, 65, 193, 2, 3, 8, False),
    (1, 1, 130, 3, 1, 24, False),
    (2, 9, 9, 1, 5, 40, True),
    (1, 100, 130, 1, 2, 128, False),
    (1, 70, 70, 1, 1, 200, False),
    (1, 33, 90, 1, 2, 256, True),
    (1, 1, 1, 1, 1, 16, False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"stick_epsilon": 0.0, "attend_current": False, "scale": -0.3}])
def test_against_the_reference(dtype, shape, options, device):
    *sizes, shared = shape
    check(*inputs(*sizes, dtype, shared=shared), device, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_any_order_of_warps(dtype, dim, device, schedule):
    q, k, v = inputs(1, 150, 210, 1, 1, dim, dtype, seed=schedule)
    check(q, k, v, device, stick_epsilon=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [-9.0, 0.0, 6.0])
def test_long_rows(dtype, mean, device):
    # At -9 the sum of a thousand small weights must not be lost; at 0 what rounding leaves of delta must not reach
    # the thousand keys behind the end of the stick. At 6 every gradient has a factor of 1/400, but rounding is relative
    # to the sums it is the difference of.
    q, k, v = inputs(1, 70, 1100, 1, 1, 64, dtype, mean=mean, gain=0.5)
    check(q, k, v, device, stick_epsilon=0.0, floor=4e-5 if mean > 0 else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_walks_through_several_windows(dtype, device):
    # dQ and the sticks go through the workspace from one window of 1024 keys to the next.
    q, k, v = inputs(1, 40, 4200, 1, 1, 16, dtype, mean=-7.0, gain=0.5)
    check(q, k, v, device, stick_epsilon=0.0, floor=4e-5)
    check(*inputs(1, 40, 2100, 1, 2, 16, dtype), device)  # and all sticks end in the newest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [30.0, 63.0, 64.5, 90.0, 1000.0])
def test_saturation(dtype, size, device):
    # Every logit is +-size: whole rows of keys that take everything or nothing.
    generator = torch.Generator().manual_seed(1)
    t, dim = 80, 16
    sign = torch.randint(0, 2, (1, t, 1, 1), generator=generator) * 2 - 1
    q = torch.full((1, t, 1, dim), 1.0, dtype=dtype)
    k = (sign * size / dim).expand(1, t, 1, dim).to(dtype)
    v = torch.randn(1, t, 1, dim, generator=generator).to(dtype)
    for scale in (1.0, -1.0):
        exact = run(reference.stick_attention, q, k, v, dtype=torch.float64, scale=scale)
        for name, ours, truth in zip(
            NAMES, run(stick_attention, q, k, v, device=device, scale=scale), exact, strict=True
        ):
            assert torch.isfinite(ours).all(), name
            assert (ours.double() - truth).abs().max() <= FLOOR[dtype] * max(1.0, truth.abs().max().item()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2])
def test_key_padding(dtype, group, device):
    q, k, v = inputs(3, 70, 170, 1, group, 32, dtype)
    keep = torch.rand(3, 170, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[1, :140] = False  # whole tiles
    keep[2] = False
    check(q, k, v, device, key_padding_mask=keep)
    check(q, k, v, device, key_padding_mask=keep, attend_current=False, stick_epsilon=0.0)
    o, remainder, dq, dk, dv = run(stick_attention, q, k, v, device=device, key_padding_mask=keep)
    assert torch.equal(o[2], torch.zeros_like(o[2]))
    assert torch.equal(remainder[2], torch.ones_like(remainder[2]))
    assert torch.equal(dq[2], torch.zeros_like(dq[2]))
    assert not dk[~keep].any()
    assert not dv[~keep].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouped", [False, True])
def test_packed_sequences(dtype, grouped, device):
    lengths_q, lengths_k = [5, 0, 130, 64, 1, 0], [9, 0, 130, 200, 1, 7]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths_q, lengths_k))
    q, k, v = (t[0] for t in inputs(1, sum(lengths_q), sum(lengths_k), 2, 2, 16, dtype))
    if grouped:
        q = q.unflatten(1, (2, 2))
    check(q, k, v, device, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    check(q, k, v, device, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, attend_current=False, stick_epsilon=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype, device):
    batch, t, heads, group, dim = 2, 70, 3, 2, 16
    generator = torch.Generator().manual_seed(5)
    routed = torch.randn(batch, t, group, heads, dim, generator=generator).to(dtype)
    q = routed.transpose(2, 3)  # [B, T, H, G, D]
    packed_kv = torch.randn(batch, t, 2, heads, dim, generator=generator).to(dtype)
    k, v = packed_kv.unbind(2)
    plain = stick_attention(*(x.contiguous().to(device) for x in (q, k, v)))
    there = routed.to(device).transpose(2, 3)
    o = stick_attention(there, *packed_kv.to(device).unbind(2))
    assert o.stride() == there.stride()
    assert torch.equal(o, plain)
    one_head = k[:, :, :1].to(device).expand(-1, -1, heads, -1)
    check(q, one_head.cpu(), v, device)
    # Rows at addresses that are multiples of an element only.
    odd = torch.randn(batch, t, heads, dim + 1, generator=generator).to(dtype)
    value = torch.randn(batch, t, heads, dim + 3, generator=generator).to(dtype)
    wide_q = torch.randn(batch, t, heads, dim + 5, generator=generator).to(dtype)
    check(wide_q[..., 1:-4], odd[..., 1:], value[..., 2:-1], device)
    views = [wide_q.to(device)[..., 1:-4], odd.to(device)[..., 1:], value.to(device)[..., 2:-1]]
    assert torch.equal(stick_attention(*views), stick_attention(*(x.contiguous() for x in views)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [2.0**-24, 1e-3, 0.2, 2.0])
def test_early_exit_keeps_its_promise(dtype, epsilon, device):
    q, k, v = inputs(1, 400, 400, 1, 1, 32, dtype)
    exact, left = reference.stick_attention(q.double(), k.double(), v.double(), return_remainder=True)
    q, k, v = (x.to(device) for x in (q, k, v))
    o, remainder = (x.cpu() for x in stick_attention(q, k, v, stick_epsilon=epsilon, return_remainder=True))
    rounding = (stick_attention(q, k, v, stick_epsilon=0.0).cpu().double() - exact).abs().max()
    assert (o.double() - exact).abs().max() <= epsilon * v.cpu().double().norm(dim=-1).max() + rounding * 1.01
    assert (remainder.double() - left).abs().max() <= epsilon + 1e-7
    op = torch.ops.moduleformer_ext.stick_attention_forward
    assert (op(q, k, v, None, True, None, None, None, epsilon, False)[3][:, -1] > 0).all()
    assert not op(q, k, v, None, True, None, None, None, 0.0, False)[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_after_early_exit(dtype, device):
    q, k, v = inputs(1, 300, 320, 2, 1, 16, dtype)
    whole = run(stick_attention, q, k, v, device=device, stick_epsilon=0.0)
    for name, ours, theirs in zip(NAMES, run(stick_attention, q, k, v, device=device), whole, strict=True):
        assert relative_error(ours, theirs, 2**-24) < (1e-5 if dtype == torch.float32 else 1e-3), name
    # Where nothing at all is visited, nothing is left unwritten.
    assert not run(stick_attention, q, k, v, device=device, stick_epsilon=2.0)[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype, device, schedule):
    q, k, v = inputs(1, 130, 200, 1, 2, 64, dtype)
    first = run(stick_attention, q, k, v, device=device)
    for _ in range(2):
        again = run(stick_attention, q, k, v, device=device)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nothing_to_do(device):
    for batch, t_q, t_k in [(0, 4, 4), (2, 0, 0), (2, 0, 5)]:
        q, k, v = inputs(batch, t_q, t_k, 2, 2, 16, torch.float32)
        o, remainder, dq, dk, dv = run(stick_attention, q, k, v, device=device)
        assert o.shape == dq.shape == q.shape
        assert remainder.shape == q.shape[:-1]
        assert not dk.any()
        assert not dv.any()
    q, k, v = (x.to(device) for x in inputs(1, 1, 1, 1, 1, 8, torch.float32))
    o, remainder = stick_attention(q, k, v, attend_current=False, return_remainder=True)
    assert not o.any()
    assert (remainder == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 128, 256, 512])
@pytest.mark.parametrize(("t_q", "group", "epsilon"), [(1, 4, None), (1, 64, None), (2, 65, 0.0), (70, 1, 2.0)])
def test_rows_that_meet_no_key_are_zero(dtype, dim, t_q, group, epsilon, device, schedule):
    # The first query sees nothing, with 64 heads a whole tile of rows does not. A tile whose sticks may all be left
    # over stops before its first key, while copies to shared memory are under way.
    q, k, _ = inputs(1, t_q, t_q, 1, group, dim, dtype, shared=True)
    leaves = [q.to(device).requires_grad_(), k.to(device).requires_grad_()]
    o, remainder = stick_attention(*leaves, None, attend_current=False, stick_epsilon=epsilon, return_remainder=True)
    dq, dk = torch.autograd.grad([o, remainder], leaves, [torch.ones_like(o), torch.ones_like(remainder)])
    rows = slice(None) if epsilon == 2.0 and dim <= 256 else slice(1)
    assert not o[:, rows].any()
    assert not dq[:, rows].any()
    assert (remainder[:, rows] == 1).all()
    assert dk.isfinite().all()


def test_not_a_number_is_not_hidden(device):
    q, k, v = inputs(1, 8, 8, 1, 1, 8, torch.float32)
    q[0, 4] = math.nan
    o = stick_attention(*(x.to(device) for x in (q, k, v))).cpu()
    assert o[0, 4].isnan().all()
    assert not o[0, :4].isnan().any()


@pytest.mark.parametrize("setting", SETTINGS)
def test_tf32_is_opt_in(device, setting):
    q, k, v = inputs(1, 70, 100, 1, 1, 64, torch.float32)
    exact = run(reference.stick_attention, q, k, v, dtype=torch.float64)
    with tf32(setting):
        ours = run(stick_attention, q, k, v, device=device)
    errors = [relative_error(value, truth, 2**-24) for value, truth in zip(ours, exact, strict=True)]
    assert all(error < 4e-3 for error in errors), errors
    assert errors[0] > 1e-5  # it was used


def test_double_has_no_kernel(device):
    q, k, v = (x.to(device) for x in inputs(1, 4, 4, 1, 1, 8, torch.float64))
    with pytest.raises(ValueError, match="stick_attention: q must be float32, bfloat16 or float16"):
        stick_attention(q, k, v)


@pytest.mark.parametrize(("dim", "dtype"), [(32, torch.float32), (32, torch.bfloat16), (264, torch.bfloat16)])
def test_values_at_the_address_of_keys_are_not_keys(dim, dtype, device):
    q, k, _ = inputs(2, 20, 40, 2, 1, dim, dtype)
    check_values_at_the_keys_address(q.to(device), k.to(device))
