"""stick_attention as a citizen of torch: dispatch, compilation, autocast, determinism, messages, instruction sets."""

import math

import pytest
import torch
from instruction_sets import run_with

from moduleformer_ext.ops import stick_attention

OP = torch.ops.moduleformer_ext


def inputs(batch=2, t_q=20, t_k=30, heads=2, group=2, dim=16, dtype=torch.float32, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, t_q, heads * group, dim), (batch, t_k, heads, dim), (batch, t_k, heads, dim)]
    return [torch.randn(*s, generator=generator).to(dtype).requires_grad_(requires_grad) for s in shapes]


def gradients(q, k, v, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    o, remainder = stick_attention(*leaves, return_remainder=True, **options)
    return [o, remainder, *torch.autograd.grad(o.square().sum() + remainder.sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain", "shared", "grouped", "mask", "packed"])
def test_opcheck(dtype, case):
    q, k, v = inputs(dtype=dtype, requires_grad=True)
    mask = cu_q = cu_k = None
    if case == "shared":
        v = None
    elif case == "grouped":
        q = torch.randn(2, 20, 2, 2, 16, dtype=dtype).transpose(2, 3).requires_grad_()
    elif case == "mask":
        mask = torch.rand(2, 30) < 0.7
    elif case == "packed":
        q, k, v = (t.detach().flatten(0, 1).requires_grad_() for t in (q, k, v))
        cu_q, cu_k = torch.tensor([0, 13, 40], dtype=torch.int32), torch.tensor([0, 15, 60], dtype=torch.int32)
    args = (q, k, v, 0.3, True, mask, cu_q, cu_k, 0.0, True)
    torch.library.opcheck(OP.stick_attention_forward.default, args)

    with torch.no_grad():
        o, remainder, residual, tiles = OP.stick_attention_forward(*args)
        grads = torch.randn_like(o), torch.randn_like(remainder)
        leaves = q.detach(), k.detach(), v if v is None else v.detach()
        saved = o, remainder, residual, tiles, 0.3, True, mask, cu_q, cu_k
        torch.library.opcheck(OP.stick_attention_backward.default, (*grads, *leaves, *saved))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, monkeypatch, tmp_path):
    def loss(q, k, v):
        o, remainder = stick_attention(q * 2, k, v, return_remainder=True)
        return o.square().sum() + remainder.sum()

    # What was compiled against an older build must not be met again.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for t_q, t_k in [(20, 30), (33, 47)]:
        q, k, v = inputs(t_q=t_q, t_k=t_k, requires_grad=True)
        eager = torch.autograd.grad(loss(q, k, v), (q, k, v))
        for ours, theirs in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), eager, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_exports():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return stick_attention(q, k, v, return_remainder=True)

    q, k, v = inputs(t_q=24, t_k=24)
    t = torch.export.Dim("t", min=2, max=4096)
    program = torch.export.export(Attention(), (q, k, v), dynamic_shapes=({1: t}, {1: t}, {1: t}))
    longer = inputs(t_q=70, t_k=70)
    for ours, theirs in zip(program.module()(*longer), Attention()(*longer), strict=True):
        assert torch.equal(ours, theirs)


def test_fake_and_meta_tensors_tell_the_layout():
    q = torch.randn(2, 20, 3, 2, 16).transpose(2, 3)
    k = torch.randn(2, 25, 2, 16)
    real = OP.stick_attention_forward(q, k, None, None, True, None, None, None, None, True)
    meta = OP.stick_attention_forward(q.to("meta"), k.to("meta"), None, None, True, None, None, None, None, True)
    for ours, theirs in zip(real, meta, strict=True):
        assert ours.shape == theirs.shape
        assert ours.stride() == theirs.stride()
        assert ours.dtype == theirs.dtype


def test_autocast_rounds_inputs_and_keeps_sticks():
    q, k, v = inputs(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        o, remainder = stick_attention(q, k, v, return_remainder=True)
    expected, left = stick_attention(*(t.bfloat16() for t in (q, k, v)), return_remainder=True)
    assert o.dtype == torch.bfloat16
    assert remainder.dtype == torch.float32
    assert torch.equal(o, expected)
    assert torch.equal(remainder, left)
    o.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_gradients_where_some_are_not_wanted():
    q, k, v = inputs()
    full = gradients(q, k, v)
    q.requires_grad_()
    o, remainder = stick_attention(q, k, v, return_remainder=True)
    (dq,) = torch.autograd.grad(o.square().sum() + remainder.sum(), q)
    assert torch.equal(dq, full[2])
    (only_remainder,) = torch.autograd.grad(stick_attention(q, k, v, return_remainder=True)[1].sum(), q)
    (only_o,) = torch.autograd.grad(stick_attention(q, k, v, return_remainder=True)[0].square().sum(), q)
    torch.testing.assert_close(only_o + only_remainder, dq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "group", "dim"), [(1, 2, 32), (4, 1, 16)])
def test_same_bits_for_every_number_of_threads_and_every_time(dtype, heads, group, dim, set_threads):
    q, k, v = inputs(1, 400, 450, heads, group, dim, dtype)
    set_threads(1)
    first = gradients(q, k, v, stick_epsilon=0.0)
    for count in (1, 2, 3, 2, 3):
        set_threads(count)
        for ours, theirs in zip(gradients(q, k, v, stick_epsilon=0.0), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("new_memory_is_nan")
def test_every_output_is_written():
    q, k, v = inputs(2, 90, 150, 2, 3, 24)
    keep = torch.rand(2, 150) < 0.5
    cu = torch.tensor([0, 0, 70, 90], dtype=torch.int32)
    packed = [t[0, :90].contiguous() for t in (q, k, v)]
    for args, options in [
        ((q, k, v), {}),
        ((q, k, v), {"attend_current": False, "key_padding_mask": keep}),
        (packed, {"cu_seqlens_q": cu, "attend_current": False}),
        ((q[:, :0], k, v), {}),
    ]:
        for tensor in gradients(*args, **options):
            assert tensor.isfinite().all()


def test_inputs_are_left_alone_and_autograd_notices_changes():
    q, k, v = inputs(requires_grad=True)
    before = [t.detach().clone() for t in (q, k, v)]
    o = stick_attention(q, k, v)
    o.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
    o = stick_attention(q, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


Q, K = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8)
CU = torch.tensor([0, 2, 3], dtype=torch.int32)
BAD = [
    ((Q[0], K, K), {}, r"q must be \[B, T_q, H_q, D\] or \[B, T_q, H_kv, G, D\], got shape \[3, 4, 8\]"),
    ((Q, K[0], K[0]), {}, r"k must be \[B, T_k, H_kv, D\], got shape"),
    ((Q.int(), K, K), {}, "q must be float32, float64, bfloat16 or float16, got Int"),
    ((Q, K.double(), K), {}, r"k must have the dtype of q \(Float\), got Double"),
    ((Q, K, K.half()), {}, r"v must have the dtype of q \(Float\), got Half"),
    ((Q[..., :4], K[..., :4], None), {}, r"q must have a head dim that is a multiple of 8 in \[8, 1024\], got 4"),
    ((Q.repeat(1, 1, 1, 2)[..., :12], K, None), {}, r"q must have a head dim that is a multiple of 8 .* got 12"),
    ((torch.zeros(1, 1, 1, 1032), torch.zeros(1, 1, 1, 1032), None), {}, r"in \[8, 1024\], got 1032"),
    ((Q, K.repeat(1, 1, 1, 2), None), {}, r"k must have q's head dim \(8\), got 16"),
    ((Q[:, :, :3], K, None), {}, "q must have a multiple of k's 2 heads, got 3"),
    ((Q, K[:, :, :0], None), {}, "k must have at least one head"),
    ((Q.unflatten(2, (4, 1)), K, None), {}, "q must have k's 2 heads, got 4"),
    ((Q, K[:1], None), {}, r"k must have q's batch size \(2\), got 1"),
    ((Q, K[:, :2], None), {}, r"q must not have more positions than k \(2\), got 3"),
    ((Q, K, K[:, :4]), {}, r"v must have k's shape \[2, 5, 2, 8\], got shape \[2, 4, 2, 8\]"),
    ((Q, K, None), {"scale": math.inf}, "scale must be finite in float32, got inf"),
    ((Q, K, None), {"scale": math.nan}, "scale must be finite in float32, got nan"),
    ((Q, K, None), {"scale": 1e300}, "scale must be finite in float32"),
    ((Q, K, None), {"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)}, r"key_padding_mask must be \[B, T_k\] ="),
    ((Q, K, None), {"key_padding_mask": torch.ones(2, 5)}, "key_padding_mask must be bool, got Float"),
    ((Q, K, None), {"key_padding_mask": torch.ones(5, dtype=torch.bool)}, "key_padding_mask must have 2 dimensions"),
    ((Q, K.to("meta"), None), {}, r"k must be on the device of q \(cpu\), got meta"),
    ((Q, K, None), {"cu_seqlens_q": CU}, r"k must be \[total, H_kv, D\] with cu_seqlens_q, got shape"),
    ((Q[0], K[0], None), {"cu_seqlens_k": CU}, r"q must be \[B, T_q, H_q, D\]"),
    ((Q, K, None), {"cu_seqlens_k": CU}, "cu_seqlens_k must come with cu_seqlens_q, got cu_seqlens_q=None"),
    ((Q[0], K[0], None), {"cu_seqlens_q": CU.long()}, "cu_seqlens_q must be int32, got Long"),
    ((Q[0], K[0], None), {"cu_seqlens_q": CU}, "cu_seqlens_k must be given where q and k have different lengths"),
    (
        (Q[0], K[0], None),
        {"cu_seqlens_q": CU, "cu_seqlens_k": CU},
        "cu_seqlens_k must ascend from 0 to the length of k, got 3 at index 2",
    ),
    (
        (Q[0], K[0, :3], None),
        {"cu_seqlens_q": CU + 1},
        "cu_seqlens_q must ascend from 0 to the length of q, got 1 at index 0",
    ),
    (
        (Q[0], K[0, :3], None),
        {"cu_seqlens_q": CU[[0, 2, 1, 2]]},
        "cu_seqlens_q must ascend from 0 to the length of q, got 2 at index 2",
    ),
    (
        (Q[0], K[0], None),
        {"cu_seqlens_q": CU, "cu_seqlens_k": torch.tensor([0, 1, 5], dtype=torch.int32)},
        "cu_seqlens_q must give no sequence more queries than cu_seqlens_k gives it keys, got 2 at index 0",
    ),
    (
        (Q[0], K[0], None),
        {"cu_seqlens_q": CU, "key_padding_mask": torch.ones(2, 5, dtype=torch.bool)},
        "key_padding_mask must be None where cu_seqlens_q is given, got both",
    ),
]


@pytest.mark.parametrize(("args", "options", "message"), BAD)
def test_messages(args, options, message):
    with pytest.raises(ValueError, match=f"^stick_attention: .*{message}"):
        stick_attention(*args, **options)


SMOKE = """
import torch
from moduleformer_ext import ops, reference
torch.manual_seed(0)
for dtype, bound in [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]:
    for t, heads, group, dim in [(150, 2, 1, 64), (70, 1, 3, 24), (33, 1, 2, 264)]:
        q, k, v = torch.randn(1, t, heads * group, dim), torch.randn(1, t, heads, dim), torch.randn(1, t, heads, dim)
        results = []
        for op, type_ in ((ops.stick_attention, dtype), (reference.stick_attention, torch.float64)):
            leaves = [x.to(dtype).to(type_, copy=True).requires_grad_() for x in (q, k, v)]
            o, r = op(*leaves, return_remainder=True)
            results.append([o, r, *torch.autograd.grad(o.double().sin().sum() + r.sum(), leaves)])
        for ours, exact in zip(*results):
            error = ((ours.double() - exact).norm() / exact.norm()).item()
            assert error < bound, (dtype, t, dim, error)
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"MFX_CPU_ISA": "baseline"},
        {"MFX_CPU_ISA": "avx2"},
        {"MFX_CPU_ISA": "avx512"},
        {"MFX_CPU_ISA": "avx512", "MFX_BRGEMM": "0"},
        {"MFX_BRGEMM": "0"},
        {"MFX_BRGEMM": "aten"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_instruction_sets(settings):
    run_with(settings, SMOKE)
