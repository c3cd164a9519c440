"""What concerns the CUDA kernels alone; tests/ops/test_stick_attention.py runs on every device."""

import pytest
import torch
from stick_cases import check, inputs, relative_error, run, strided_inputs
from strides import spaced
from tf32_settings import SETTINGS, tf32

from moduleformer_ext import reference
from moduleformer_ext.ops import stick_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_any_order_of_warps(dtype, dim, device, schedule):
    q, k, v = inputs(1, 150, 210, 1, 1, dim, dtype, seed=schedule)
    check(device, q, k, v, stick_epsilon=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_walks_through_several_windows(dtype, device):
    # dQ and the sticks go through the workspace from one window of 1024 keys to the next.
    q, k, v = inputs(1, 40, 4200, 1, 1, 16, dtype, mean=-7.0, gain=0.5)
    check(device, q, k, v, stick_epsilon=0.0, floor=4e-5)
    check(device, *inputs(1, 40, 2100, 1, 2, 16, dtype))  # and all sticks end in the newest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype, device):
    q, k, v = strided_inputs(dtype)
    plain = stick_attention(*(x.contiguous().to(device) for x in (q, k, v)))
    there = strided_inputs(dtype, device)
    o = stick_attention(*there)
    assert o.stride() == there[0].stride()
    assert torch.equal(o, plain)
    check(device, q, k[:, :, :1].expand_as(k), v)
    # Rows at addresses that are multiples of an element only.
    odd, value, wide_q = (torch.randn(2, 70, 3, dim).to(dtype) for dim in (17, 19, 21))
    check(device, wide_q[..., 1:-4], odd[..., 1:], value[..., 2:-1])
    views = [wide_q.to(device)[..., 1:-4], odd.to(device)[..., 1:], value.to(device)[..., 2:-1]]
    assert torch.equal(stick_attention(*views), stick_attention(*(x.contiguous() for x in views)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "token", "head"])
def test_rows_at_odd_distances(dim, dtype, device):
    """Only the first slice along a dimension begins at a multiple of 16 bytes, of one operand after the other."""
    q, k, v = (x.to(device) for x in inputs(2, 20, 20, 2, 2, 16, dtype))
    grad = torch.randn(q.shape).to(q)

    def results(q, k, v, grad):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        o = stick_attention(*leaves)
        return o, *torch.autograd.grad(o, leaves, grad)

    expected, given = results(q, k, v, grad), (q, k, v, grad)
    for i in range(len(given)):
        odd = results(*given[:i], spaced(given[i], dim), *given[i + 1 :])
        assert all(torch.equal(a, b) for a, b in zip(odd, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype, device, schedule):
    q, k, v = inputs(1, 130, 200, 1, 2, 64, dtype)
    first = run(stick_attention, q, k, v, device=device)
    for _ in range(2):
        again = run(stick_attention, q, k, v, device=device)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 128, 256, 512])
@pytest.mark.parametrize(("t_q", "group", "epsilon"), [(1, 4, None), (1, 64, None), (2, 65, 0.0)])
def test_rows_that_meet_no_key_are_zero(dtype, dim, t_q, group, epsilon, device, schedule):
    # The first query sees nothing, with 64 heads a whole tile of rows does not: it ends while copies to shared memory
    # are under way.
    q, k, _ = inputs(1, t_q, t_q, 1, group, dim, dtype, shared=True)
    leaves = [q.to(device).requires_grad_(), k.to(device).requires_grad_()]
    o, remainder = stick_attention(*leaves, None, attend_current=False, stick_epsilon=epsilon, return_remainder=True)
    dq, dk = torch.autograd.grad([o, remainder], leaves, [torch.ones_like(o), torch.ones_like(remainder)])
    assert not o[:, 0].any()
    assert not dq[:, 0].any()
    assert (remainder[:, 0] == 1).all()
    assert dk.isfinite().all()


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
