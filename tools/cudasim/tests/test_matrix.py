"""mma.sync, ldmatrix, stmatrix and movmatrix against numpy."""

import math
import os
from fractions import Fraction

import numpy as np
import pytest
from conftest import Buffer, from_bf16, to_bf16

import cudasim

rng = np.random.default_rng(5)
LANE = np.arange(32)


def mma_ptx(shape, types, na, nb, nc, width=32, extra=""):
    """Every lane loads its fragments from a[lane][na] etc. and stores d."""
    r = "b64" if width == 64 else "b32"
    regs = lambda p, n: "{" + ",".join("%%%s%d" % (p, i) for i in range(n)) + "}"
    body = ""
    for p, n, k in (("a", na, 1), ("b", nb, 2), ("c", nc, 3)):
        body += "ld.param.u64 %%x, [p%d]; mad.wide.u32 %%x, %%l, %d, %%x;\n" % (k, n * width // 8)
        for i in range(n):
            body += "ld.global.%s %%%s%d, [%%x+%d];\n" % (r, p, i, i * width // 8)
    body += "mma.sync.aligned.%s.row.col%s.%s %s, %s, %s, %s;\n" % (
        shape,
        extra,
        types,
        regs("d", nc),
        regs("a", na),
        regs("b", nb),
        regs("c", nc),
    )
    body += "ld.param.u64 %%x, [p0]; mad.wide.u32 %%x, %%l, %d, %%x;\n" % (nc * width // 8)
    for i in range(nc):
        body += "st.global.%s [%%x+%d], %%d%d;\n" % (r, i * width // 8, i)
    return """.version 8.5
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3) {
.reg .b64 %%x; .reg .b32 %%l; .reg .%s %%a<8>, %%b<8>, %%c<8>, %%d<8>;
mov.u32 %%l, %%tid.x;
%s ret; }""" % (r, body)


def fragments(bits, m, n, k):
    """Index arrays of the A, B and C fragments (PTX ISA, matrix fragments)."""
    e = max(32 // bits, 1)
    g, t = LANE // 4, LANE % 4
    rows = 2 if m == 16 else 1
    na, nb = m * k // 32 // e, n * k // 32 // e
    a = np.array(
        [
            [[(g[l] + 8 * (r % rows), t[l] * e + (r // rows) * 4 * e + i) for i in range(e)] for r in range(na)]
            for l in LANE
        ]
    )
    b = np.array([[[(t[l] * e + r * 4 * e + i, g[l]) for i in range(e)] for r in range(nb)] for l in LANE])
    c = np.array([[(g[l] + 8 * (r // 2), t[l] * 2 + r % 2) for r in range(2 * rows)] for l in LANE])
    return a, b, c


def pick(mat, idx):
    return mat[idx[..., 0], idx[..., 1]]


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("t", ["f16", "bf16"])
@pytest.mark.parametrize("acc", ["f32", "f16"])
def test_mma_16bit(k, t, acc):
    if t == "bf16" and acc == "f16":
        pytest.skip("not an instruction")
    A, B, C = rng.standard_normal((16, k)), rng.standard_normal((k, 8)), rng.standard_normal((16, 8))
    enc = (lambda x: x.astype(np.float16).view(np.uint16)) if t == "f16" else to_bf16
    dec = (lambda x: x.view(np.float16).astype(np.float64)) if t == "f16" else from_bf16
    ia, ib, ic = fragments(16, 16, 8, k)
    a, b = pick(enc(A), ia), pick(enc(B), ib)
    C = C.astype(np.float32 if acc == "f32" else np.float16)
    c = pick(C, ic)
    nc = 4 if acc == "f32" else 2
    out = Buffer(np.zeros((32, 4), C.dtype))
    m = cudasim.Module(mma_ptx("m16n8k%d" % k, "%s.%s.%s.%s" % (acc, t, t, acc), ia.shape[1], ib.shape[1], nc))
    keep = [Buffer(x) for x in (a, b, c)]
    m.function("k").launch(1, 32, [out.ptr] + [x.ptr for x in keep])
    D = np.zeros((16, 8))
    D[ic[..., 0], ic[..., 1]] = out.get()
    np.testing.assert_allclose(D, dec(enc(A)) @ dec(enc(B)) + C, atol=1e-5 if acc == "f32" else 2e-2)


def launch_mma(shape, types, a, b, c, ic, width=32, extra=""):
    keep = [Buffer(x) for x in (a, b, c)]
    out = Buffer(np.zeros_like(c))
    m = cudasim.Module(
        mma_ptx(shape, types, a.nbytes // 32 // (width // 8), b.nbytes // 32 // (width // 8), c.shape[1], width, extra)
    )
    m.function("k").launch(1, 32, [out.ptr] + [x.ptr for x in keep])
    D = np.zeros((ic[..., 0].max() + 1, 8), c.dtype)
    D[ic[..., 0], ic[..., 1]] = out.get()
    return D


@pytest.mark.parametrize("k", [4, 8])
def test_mma_tf32(k):
    A, B, C = (rng.standard_normal(s).astype(np.float32) for s in ((16, k), (k, 8), (16, 8)))
    ia, ib, ic = fragments(32, 16, 8, k)
    D = launch_mma("m16n8k%d" % k, "f32.tf32.tf32.f32", pick(A, ia), pick(B, ib), pick(C, ic), ic)
    cut = lambda x: (x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)
    np.testing.assert_allclose(D, cut(A) @ cut(B) + C, atol=1e-5)


def tensor_core_sum(a, b, c, terms, extra, min_exponent):
    """c + a . b as src/tensor_sum.cpp describes it, in exact arithmetic."""
    exponent = lambda x, least: max(math.frexp(x)[1] - 1, least)
    for t in range(0, len(a), terms):
        pairs = [(x, y) for x, y in zip(a[t : t + terms], b[t : t + terms], strict=True) if x and y]
        top = [exponent(x, min_exponent) + exponent(y, min_exponent) for x, y in pairs] + [exponent(c, -126)] * bool(c)
        if not top:
            return 0.0
        unit = Fraction(2) ** (max(top) - 23 - extra)
        total = sum(int(Fraction(x) * Fraction(y) / unit) for x, y in pairs) + int(Fraction(c) / unit)
        bits = max(abs(total).bit_length() - 24, 0)
        total = (abs(total) >> bits << bits) * (1 if total > 0 else -1)
        c = float(total * unit)
    return c


@pytest.mark.parametrize("spread", [0, 8, 40])
@pytest.mark.parametrize("t", ["f16", "bf16", "tf32"])
def test_sums_are_truncated_bit_by_bit(t, spread):
    hopper = int(os.environ.get("CUDASIM_ARCH", "90")) >= 90
    k = 8 if t == "tf32" else 16
    terms, least = (16 if hopper else 8) * k // 16, -14 if t == "f16" else -126
    scale = lambda s: 2.0 ** rng.integers(-spread, spread // 4 + 1, s)
    A, B = rng.standard_normal((16, k)) * scale((16, k)), rng.standard_normal((k, 8)) * scale((k, 8))
    C = (rng.standard_normal((16, 8)) * scale((16, 8))).astype(np.float32)
    C[::3], B[::4] = 0, 0
    bits = 32 if t == "tf32" else 16
    cut = lambda x: (x.astype(np.float32).view(np.uint32) & 0xFFFFE000).view(np.float32)
    enc = {"f16": lambda x: x.astype(np.float16), "bf16": to_bf16, "tf32": cut}[t]
    dec = from_bf16 if t == "bf16" else lambda x: x.astype(np.float64)
    ia, ib, ic = fragments(bits, 16, 8, k)
    a, b = (np.ascontiguousarray(pick(enc(x), i)).view(np.uint32) for x, i in ((A, ia), (B, ib)))
    D = launch_mma(f"m16n8k{k}", f"f32.{t}.{t}.f32", a, b, pick(C, ic), ic)
    A, B = dec(enc(A)), dec(enc(B))
    for i, j in np.ndindex(16, 8):
        want = tensor_core_sum(A[i].tolist(), B[:, j].tolist(), float(C[i, j]), terms, 2 if hopper else 1, least)
        assert D[i, j] == want, (i, j)


def test_a_nan_or_infinity_reaches_its_own_elements_alone():
    A, B, C = (rng.standard_normal(s).astype(np.float32) for s in ((16, 8), (8, 8), (16, 8)))
    ia, ib, ic = fragments(32, 16, 8, 8)
    run = lambda: launch_mma("m16n8k8", "f32.tf32.tf32.f32", pick(A, ia), pick(B, ib), pick(C, ic), ic)
    clean = run()
    A[3, 5], B[2, 6], C[9, 1] = np.nan, np.inf, -np.inf
    D = run()
    assert np.isnan(D[3]).all() and D[9, 1] == -np.inf and not np.isfinite(D[:, 6]).any()
    D[3], D[:, 6], D[9, 1] = clean[3], clean[:, 6], clean[9, 1]
    assert (clean == D).all()


@pytest.mark.parametrize(("factor", "sum_of_16"), [(63, np.inf), (-75, 2.0**-146), (-80, 0.0)])
def test_sums_overflow_and_underflow(factor, sum_of_16):
    ia, ib, ic = fragments(16, 16, 8, 16)
    x = to_bf16(np.full((16, 16), 2.0**factor))
    a, b = (np.ascontiguousarray(pick(m, i)).view(np.uint32) for m, i in ((x, ia), (x[:, :8], ib)))
    D = launch_mma("m16n8k16", "f32.bf16.bf16.f32", a, b, pick(np.zeros((16, 8), np.float32), ic), ic)
    assert (np.float32(sum_of_16) == D).all()


@pytest.mark.parametrize("k", [16, 32])
@pytest.mark.parametrize("ta", ["s8", "u8"])
@pytest.mark.parametrize("tb", ["s8", "u8"])
def test_mma_int8(k, ta, tb):
    A, B = rng.integers(0, 256, (16, k)).astype(np.uint8), rng.integers(0, 256, (k, 8)).astype(np.uint8)
    C = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
    ia, ib, ic = fragments(8, 16, 8, k)
    D = launch_mma("m16n8k%d" % k, "s32.%s.%s.s32" % (ta, tb), pick(A, ia), pick(B, ib), pick(C, ic), ic)
    v = lambda x, t: (x.view(np.int8) if t == "s8" else x).astype(np.int64)
    assert (v(A, ta) @ v(B, tb) + C == D).all()


def test_mma_int8_saturates():
    A, B = np.full((16, 32), 127, np.uint8), np.full((32, 8), 127, np.uint8)
    C = np.full((16, 8), 2**31 - 5, np.int32)
    ia, ib, ic = fragments(8, 16, 8, 32)
    D = launch_mma("m16n8k32", "s32.s8.s8.s32", pick(A, ia), pick(B, ib), pick(C, ic), ic, extra=".satfinite")
    assert (D == 2**31 - 1).all()


def test_mma_f64():
    A, B, C = (rng.standard_normal(s) for s in ((8, 4), (4, 8), (8, 8)))
    g, t = LANE // 4, LANE % 4
    ic = np.array([[(g[l], 2 * t[l] + i) for i in range(2)] for l in LANE])
    D = launch_mma(
        "m8n8k4", "f64.f64.f64.f64", A[g, t].reshape(32, 1), B[t, g].reshape(32, 1), pick(C, ic), ic, width=64
    )
    np.testing.assert_allclose(D, A @ B + C, rtol=1e-12)


LDM = """.version 8.5
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 src, .param .u64 dst, .param .u64 back) {
.reg .b64 %%a, %%b; .reg .b32 %%l, %%s, %%r<4>, %%t;
.shared .align 16 .b8 buf[512];
.shared .align 16 .b8 buf2[512];
mov.u32 %%l, %%tid.x;
ld.param.u64 %%a, [src]; mad.wide.u32 %%a, %%l, 16, %%a;
ld.global.v4.b32 {%%r0, %%r1, %%r2, %%r3}, [%%a];
mov.u32 %%s, buf; mad.lo.u32 %%s, %%l, 16, %%s;
st.shared.v4.b32 [%%s], {%%r0, %%r1, %%r2, %%r3};
bar.warp.sync 0xffffffff;
ldmatrix.sync.aligned.m8n8.x4%s.shared.b16 {%%r0, %%r1, %%r2, %%r3}, [%%s];
ld.param.u64 %%a, [dst]; mad.wide.u32 %%a, %%l, 16, %%a;
st.global.v4.b32 [%%a], {%%r0, %%r1, %%r2, %%r3};
mov.u32 %%s, buf2; mad.lo.u32 %%s, %%l, 16, %%s;
movmatrix.sync.aligned.m8n8.trans.b16 %%t, %%r0;
stmatrix.sync.aligned.m8n8.x4%s.shared.b16 [%%s], {%%t, %%r1, %%r2, %%r3};
bar.warp.sync 0xffffffff;
ld.shared.v4.b32 {%%r0, %%r1, %%r2, %%r3}, [%%s];
ld.param.u64 %%b, [back]; mad.wide.u32 %%b, %%l, 16, %%b;
st.global.v4.b32 [%%b], {%%r0, %%r1, %%r2, %%r3};
ret; }"""


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_stmatrix(trans):
    t = ".trans" if trans else ""
    src = rng.integers(0, 65536, (4, 8, 8)).astype(np.uint16)  # matrix, row, column
    s, d, b = Buffer(src), Buffer(np.zeros((32, 4, 2), np.uint16)), Buffer(np.zeros((4, 8, 8), np.uint16))
    cudasim.Module(LDM % (t, t)).function("k").launch(1, 32, [s.ptr, d.ptr, b.ptr])
    want = np.zeros((32, 4, 2), np.uint16)
    for l in range(32):
        for j in range(4):
            for e in range(2):
                want[l, j, e] = src[j, 2 * (l % 4) + e, l // 4] if trans else src[j, l // 4, 2 * (l % 4) + e]
    assert (d.get() == want).all()
    back = src.copy()
    back[0] = src[0].T
    assert (b.get() == back).all()
    assert cudasim.stats()[-1]["shared_excess_wavefronts"] == 0


@pytest.mark.parametrize("kind", range(5))
def test_wmma(kind):
    from conftest import compile_cuda

    so = compile_cuda("wmma.cu")
    m, n, k = [(16, 16, 16), (16, 16, 16), (32, 8, 16), (16, 16, 16), (8, 8, 4)][kind]
    if kind == 3:
        A, B, C = (
            rng.integers(-128, 128, (m, k)).astype(np.int8),
            rng.integers(-128, 128, (k, n)).astype(np.int8),
            np.arange(m * n, dtype=np.int32).reshape(m, n),
        )
        a, b = A, B
    else:
        A, B, C = rng.standard_normal((m, k)), rng.standard_normal((k, n)), rng.standard_normal((m, n))
        enc = (to_bf16, lambda x: x.astype(np.float16))[kind < 2] if kind < 4 else lambda x: x
        a, b = enc(A), enc(B)
        A, B = (from_bf16(a), from_bf16(b)) if kind == 2 else (a.astype(np.float64), b.astype(np.float64))
        C = C.astype([np.float32, np.float16, np.float32, None, np.float64][kind])
    c = Buffer(C)
    assert (
        so.w_tile(
            kind,
            Buffer(np.ascontiguousarray(a.T) if kind == 2 else a),
            Buffer(np.ascontiguousarray(b.T) if kind in (0, 2, 3) else b),
            c,
        )
        == 0
    ), cudasim.last_fault()
    want = A.astype(np.float64) @ B.astype(np.float64) + C
    np.testing.assert_allclose(c.get().astype(np.float64), want, atol=[1e-5, 2e-2, 1e-5, 0, 1e-12][kind])
