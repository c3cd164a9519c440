"""Inputs and checks of stick_attention_decode, for every device. The cache is NaN wherever no key was written, so that
reading too far shows."""

import torch

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


def long_tail(keys, *, mean, spread=1.0, **sizes):
    """Logits (with scale 1) around `mean`: sticks that hardly shrink."""
    q, k, v, lengths = case(batch=1, kv_heads=1, cache=keys, lengths=[keys], **sizes)
    q.zero_()[..., 0] = 1
    k[..., 0] = mean + spread * k[..., 0]
    return q, k, v, lengths


def decode(device, q, k, v, lengths, *, key_padding_mask=None, **options):
    """Output and remainder of the op on `device`, back on the CPU."""
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


def oracle(q, k, v, lengths, **options):
    options = {**options, "stick_epsilon": 0.0, "return_remainder": True}
    v = None if v is None else v.double()
    return reference.stick_attention_decode(q.double(), k.double(), v, lengths, **options)


def relative_error(actual, expected):
    error = (actual.double() - expected.double()).norm()
    return (error / expected.double().norm().clamp_min(1e-30)).item()


def check(device, q, k, v, lengths, **options):
    out, remainder = decode(device, q, k, v, lengths, **options)
    expected, expected_remainder = oracle(q, k, v, lengths, **options)
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    assert remainder.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert remainder.shape == q.shape[:-1]
    assert not out.isnan().any()
    assert relative_error(out, expected) <= TOLERANCE[q.dtype]
    torch.testing.assert_close(remainder.double(), expected_remainder, rtol=CLOSE[q.dtype], atol=2**-23)
