"""Operands and the measure of error that the tests of stick_attention share."""

import math

import torch
from devices import on_cuda

from moduleformer_ext import reference
from moduleformer_ext.ops import stick_attention, stick_attention_decode

NAMES = ("o", "remainder", "dq", "dk", "dv")
CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def floor_of(dtype, device):
    """What rounding may cost however exact the twin happens to be; on CUDA ex2.approx and the like err by 2 ulp."""
    return 5e-6 if dtype == torch.float32 and on_cuda(device) else FLOOR[dtype]


def relative_error(value, exact, slack=0.0):
    """By norm, of what exceeds ``slack`` per element."""
    difference = (value.double() - exact.double()).abs() - slack
    return (difference.clamp_min(0).norm() / exact.double().norm().clamp_min(1e-30)).item()


def inputs(batch, t_q, t_k, heads, group, dim, dtype, *, shared=False, mean=0.0, gain=1.0, seed=0):
    """q, k, v (None: shared) with logits around N(mean, gain^2)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(batch, t_q, heads * group, dim), normal(batch, t_k, heads, dim), normal(batch, t_k, heads, dim)
    if mean or gain != 1.0:
        q, k = q * gain, k.clone()
        q[..., 0], k[..., 0] = math.copysign(math.sqrt(abs(mean)), mean) * dim**0.25, math.sqrt(abs(mean)) * dim**0.25
    return q.to(dtype), k.to(dtype), None if shared else v.to(dtype)


def strided_inputs(dtype, device=CPU):
    """q [B, T, H, G, D], k and v, none of them contiguous: views of a router's rows and of packed keys and values."""
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(2, 70, 2, 3, 16, generator=generator).to(device, dtype).transpose(2, 3)
    return q, *torch.randn(2, 70, 2, 3, 16, generator=generator).to(device, dtype).unbind(2)


def run(function, q, k, v, *, dtype=None, device=CPU, **options):
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


def check(device, q, k, v, *, factor=2.0, floor=0.0, **options):
    """The op on `device` against the twin in float64; the twin in the op's own type measures what rounding costs."""
    exact_options = {name: value for name, value in options.items() if name != "stick_epsilon"}
    exact = run(reference.stick_attention, q, k, v, dtype=torch.float64, **exact_options)
    peer = run(reference.stick_attention, q, k, v, **exact_options)
    ours = run(stick_attention, q, k, v, device=device, **options)
    for name, value, theirs, truth in zip(NAMES, ours, peer, exact, strict=False):
        assert value.dtype == theirs.dtype
        assert value.shape == theirs.shape
        rounded, slack = max(floor, floor_of(q.dtype, device)), 0.0
        if name == "remainder" and q.dtype != torch.float64:
            rounded = max(floor if on_cuda(device) else 0.0, floor_of(torch.float32, device))
            slack = 2**-24  # the default stick_epsilon
        assert relative_error(value, truth, slack) <= factor * relative_error(theirs, truth) + rounded, name


def check_values_at_the_keys_address(q, k):
    """Values [B, T, H, D] that begin where k does but repeat one of its dimensions are not k."""
    for v in (k[:1].expand_as(k), k[:, :1].expand_as(k), k[:, :, :1].expand_as(k)):
        results = []
        for values in (v, v.clone()):
            leaves = [t.detach().requires_grad_() for t in (q, k, values)]
            o = stick_attention(*leaves)
            grads = torch.autograd.grad(o.square().sum(dtype=torch.float32), leaves)
            lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)
            results.append([o, *grads, stick_attention_decode(q, k, values, lengths)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
