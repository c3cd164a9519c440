"""Operands and the measure of error that the tests of stick_attention share."""

import math

import torch

from moduleformer_ext.ops import stick_attention, stick_attention_decode

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
