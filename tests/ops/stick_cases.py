"""Operands and the measure of error that the tests of stick_attention share."""

import math

import torch

NAMES = ("o", "remainder", "dq", "dk", "dv")


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
