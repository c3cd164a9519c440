"""What a row does not see cannot reach it, where the CUDA kernels have parts of their own: windows of keys in backward,
tiles split over warps, rows at any address, slots of a cache. The property at large is tested for all devices alike."""

from itertools import product

import pytest
import torch
from stick_cases import inputs
from test_stick_attention_cuda import DTYPES

from moduleformer_ext.ops import stick_attention, stick_attention_decode

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def run(device, q, k, v, grad_o, **options):
    options = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    leaves = [t.to(device, copy=True).requires_grad_() for t in (q, k, v) if t is not None]
    o = stick_attention(*leaves, **({} if v is not None else {"v": None}), **options)
    return [t.detach().cpu() for t in (o, *torch.autograd.grad(o, leaves, grad_o.to(device)))]


def cases():
    """Rows that are not finite are computed again: on the emulated device that takes a minute where keys are many."""
    windows = [(20, 1100, 1, 64, False), (20, 1100, 2, 72, True), (20, 1040, 1, 520, True)]
    for shape, dtype, poison in product([(20, 60, 3, 256, False), *windows], DTYPES, [torch.nan, torch.inf]):
        slow = shape[3] > 256 or (shape in windows and (dtype, poison) != (torch.bfloat16, torch.nan))
        yield pytest.param(*shape, dtype, poison, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("t_q", "t_k", "group", "dim", "shared", "dtype", "poison"), list(cases()))
def test_poison_at_masked_keys_and_in_the_future(t_q, t_k, group, dim, shared, dtype, poison, device):
    q, k, v = inputs(1, t_q, t_k, 1, group, dim, dtype, shared=shared, mean=-7.0, gain=0.5)
    grad_o = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.rand(1, t_k, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[:, -t_q:] = True
    cut = t_q // 2  # rows from here on are poison, and so are their own keys
    options = {"key_padding_mask": mask, "stick_epsilon": 0.0}
    clean = run(device, q, k, v, grad_o, **options)
    hidden = ~mask[0]
    hidden[t_k - t_q + cut :] = True
    poisoned = [None if t is None else t.clone() for t in (q, k, v, grad_o)]
    for keys in poisoned[1:3]:
        if keys is not None:
            keys[:, hidden] = poison
    ours = run(device, *poisoned, **options)
    for name, actual, expected in zip(("o", "dq"), ours[:2], clean[:2], strict=True):
        error = (actual[:, :cut] - expected[:, :cut]).abs().max() / expected.abs().max()
        assert error <= TOLERANCE[dtype], name
    # Gradients of keys that later rows alone see depend on nothing of earlier rows.
    poisoned = [None if t is None else t.clone() for t in (q, k, v, grad_o)]
    poisoned[0][:, :cut], poisoned[3][:, :cut] = poison, poison
    later = slice(t_k - t_q + cut, None)
    for actual, expected in zip(run(device, *poisoned, **options)[2:], clean[2:], strict=True):
        assert (actual[:, later] - expected[:, later]).abs().max() / expected.abs().max() <= TOLERANCE[dtype]
        assert not actual[:, ~mask[0]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_at_any_address(dtype, device):
    q, k, v = (t.to(device) for t in inputs(1, 40, 40, 1, 1, 17, dtype))
    q, k, v = q[..., 1:], k[..., 1:], v[..., 1:]
    clean = stick_attention(q, k, v)
    v[:, 20:] = torch.nan
    o = stick_attention(q, k, v)
    torch.testing.assert_close(o[:, :20], clean[:, :20], rtol=1e-2, atol=1e-5 if dtype == torch.float32 else 1e-2)
    assert o[:, 20:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (5, 128), (2, 1000)])
def test_poison_in_every_slot_of_a_cache(group, dim, shared, dtype, device):
    q, k, v = inputs(1, 2, 700, 1, group, dim, dtype, shared=shared, mean=-7.0, gain=0.5)
    q = q[:, :, None]  # one K/V head
    mask = torch.rand(1, 700, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[:, -2:] = True
    lengths = torch.tensor([700], dtype=torch.int32, device=device)

    def decode(k, v):
        on = [None if t is None else t.to(device) for t in (k, v)]
        options = {"key_padding_mask": mask.to(device), "stick_epsilon": 0.0}
        return stick_attention_decode(q.to(device), *on, lengths, **options).cpu()

    clean = decode(k, v)
    hidden = ~mask[0]
    hidden[-1] = True  # the second query's own key
    k, v = k.clone(), None if v is None else v.clone()
    for keys in (k, v):
        if keys is not None:
            keys[:, hidden] = torch.inf
    ours = decode(k, v)
    assert (ours[:, 0] - clean[:, 0]).abs().max() <= TOLERANCE[dtype] * clean[:, 0].abs().max()
    assert not ours[:, 1].isfinite().any()
