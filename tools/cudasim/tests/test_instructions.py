"""Single instructions against numpy, on random and special values."""

import numpy as np
import pytest
from conftest import Buffer, from_bf16, to_bf16

import cudasim

N = 4096
SIZES = {
    "u16": 2,
    "b16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "u32": 4,
    "s32": 4,
    "b32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "u64": 8,
    "s64": 8,
    "b64": 8,
    "f64": 8,
}
NP = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def elementwise(body, dst, srcs, regs=""):
    """Runs `body` with %d and %s0.. as registers of the named types."""
    decl, loads = "", ""
    for _i, (name, t) in enumerate([("%d", dst)] + [("%%s%d" % k, t) for k, t in enumerate(srcs)]):
        decl += ".reg .b%d %s;\n" % (8 * SIZES[t], name)
    params = ", ".join(".param .u64 p%d" % i for i in range(len(srcs) + 1))
    for k, t in enumerate(srcs):
        n = SIZES[t]
        loads += "ld.param.u64 %%a, [p%d]; mad.wide.u32 %%a, %%i, %d, %%a; ld.global.b%d %%s%d, [%%a];\n" % (
            k + 1,
            n,
            8 * n,
            k,
        )
    n = SIZES[dst]
    return """
.version 8.5
.target sm_90a
.address_size 64
.visible .entry k(%s) {
.reg .b64 %%a; .reg .b32 %%i, %%t, %%u, %%v; .reg .pred %%p, %%q;
%s%s
mov.u32 %%i, %%ctaid.x; mov.u32 %%t, %%ntid.x; mov.u32 %%u, %%tid.x; mad.lo.u32 %%i, %%i, %%t, %%u;
%s
%s
ld.param.u64 %%a, [p0]; mad.wide.u32 %%a, %%i, %d, %%a; st.global.b%d [%%a], %%d;
ret; }
""" % (params, decl, regs, loads, body, n, 8 * n)


def run(body, dst, srcs, *arrays, regs=""):
    m = cudasim.Module(elementwise(body, dst, srcs, regs))
    bufs = [Buffer(np.ascontiguousarray(a)) for a in arrays]
    out = Buffer(np.zeros(len(arrays[0]), NP[SIZES[dst]]))
    m.function("k").launch(len(arrays[0]) // 128, 128, [out.ptr] + [b.ptr for b in bufs])
    return out.get()


rng = np.random.default_rng(1)


def ints(bits, signed=False):
    a = rng.integers(0, 1 << 63, N, dtype=np.uint64) * np.uint64(2) + rng.integers(0, 2, N, dtype=np.uint64)
    a = a.astype(NP[bits // 8])
    a[:8] = np.array(
        [0, 1, 2, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 3, 0x55], dtype=np.uint64
    ).astype(a.dtype)
    rng.shuffle(a[:64])
    return a.view(np.dtype("i%d" % (bits // 8))) if signed else a


def floats32(n=N):
    u = rng.integers(0, 1 << 32, n, dtype=np.uint64).astype(np.uint32)
    s = np.array(
        [
            0,
            0x80000000,
            1,
            0x80000001,
            0x7FFFFF,
            0x800000,
            0x3F800000,
            0xBF800000,
            0x7F7FFFFF,
            0x7F800000,
            0xFF800000,
            0x7FC00000,
            0xFFC00001,
            0x33800000,
            0x477FE000,
            0x477FF000,
            0x38800000,
            0x387FC000,
            0x33000000,
        ],
        np.uint32,
    )
    u[: len(s)] = s
    m = min(n, 1024) - 64
    u[64 : 64 + m] = rng.standard_normal(m).astype(np.float32).view(np.uint32)
    return u.view(np.float32)


def halves():
    h = rng.integers(0, 1 << 16, N).astype(np.uint16)
    h[:10] = [0, 0x8000, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x3C00]
    rng.shuffle(h[:200])
    return h


def same_float(a, b):
    """Equal bit for bit, any NaN equal to any other."""
    ok = (a.view(NP[a.itemsize]) == b.view(NP[b.itemsize])) | (np.isnan(a) & np.isnan(b))
    assert ok.all(), (np.flatnonzero(~ok)[:5], a[~ok][:5], b[~ok][:5])


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("op", ["add", "sub", "mul.lo", "mul.hi", "min", "max", "div", "rem"])
@pytest.mark.parametrize("signed", [False, True])
def test_int_arith(op, bits, signed):
    t = ("s" if signed else "u") + str(bits)
    a, b = ints(bits, signed), ints(bits, signed)
    got = run("%s.%s %%d, %%s0, %%s1;" % (op, t), t, [t, t], a, b)
    want = []
    mask = (1 << bits) - 1
    for x, y in zip(a.tolist(), b.tolist()):
        if op == "add":
            r = x + y
        elif op == "sub":
            r = x - y
        elif op == "mul.lo":
            r = x * y
        elif op == "mul.hi":
            r = (x * y) >> bits
        elif op == "min":
            r = min(x, y)
        elif op == "max":
            r = max(x, y)
        elif y == 0:
            r = mask if op == "div" else x
        else:
            q = abs(x) // abs(y)
            q = -q if (x < 0) != (y < 0) else q
            r = q if op == "div" else x - q * y
        want.append(r & mask)
    assert got.tolist() == want


def test_wide_and_mad():
    a, b, c = ints(32, True), ints(32, True), ints(64, True)
    got = run("mad.wide.s32 %d, %s0, %s1, %s2;", "s64", ["s32", "s32", "s64"], a, b, c)
    assert got.tolist() == [(x * y + z) & (2**64 - 1) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())]
    a, b, c = ints(32), ints(32), ints(32)
    got = run("mad.lo.cc.u32 %t, %s0, %s1, %s2; madc.hi.u32 %d, %s0, %s1, 0;", "u32", ["u32"] * 3, a, b, c)
    assert got.tolist() == [((x * y + z) >> 32) & 0xFFFFFFFF for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())]


def test_shifts_and_fields():
    a, b, s = ints(32), ints(32), rng.integers(0, 70, N).astype(np.uint32)
    M = 0xFFFFFFFF
    A, B, S = a.tolist(), b.tolist(), s.tolist()
    assert run("shl.b32 %d, %s0, %s1;", "b32", ["b32", "u32"], a, s).tolist() == [
        (x << n) & M if n < 32 else 0 for x, n in zip(A, S)
    ]
    assert run("shr.u32 %d, %s0, %s1;", "u32", ["u32", "u32"], a, s).tolist() == [
        x >> n if n < 32 else 0 for x, n in zip(A, S)
    ]
    sa = a.view(np.int32).tolist()
    assert run("shr.s32 %d, %s0, %s1;", "s32", ["s32", "u32"], a, s).tolist() == [
        (x >> min(n, 31)) & M for x, n in zip(sa, S)
    ]
    assert run("shf.l.wrap.b32 %d, %s0, %s1, %s2;", "b32", ["b32"] * 3, a, b, s).tolist() == [
        ((((y << 32) | x) << (n & 31)) >> 32) & M for x, y, n in zip(A, B, S)
    ]
    assert run("shf.r.clamp.b32 %d, %s0, %s1, %s2;", "b32", ["b32"] * 3, a, b, s).tolist() == [
        (((y << 32) | x) >> min(n, 32)) & M for x, y, n in zip(A, B, S)
    ]
    ln = rng.integers(0, 40, N).astype(np.uint32)
    L = ln.tolist()
    assert run("bfe.u32 %d, %s0, %s1, %s2;", "u32", ["u32"] * 3, a, s, ln).tolist() == [
        (x >> p) & ((1 << n) - 1) & M for x, p, n in zip(A, S, L)
    ]
    want = []
    for x, p, n in zip(A, S, L):
        sign = (x >> min(p + n - 1, 31)) & 1 if n else 0
        v = 0
        for i in range(32):
            bit = (x >> (p + i)) & 1 if i < n and p + i < 32 else sign
            v |= bit << i
        want.append(v if n else 0)
    assert run("bfe.s32 %d, %s0, %s1, %s2;", "s32", ["s32", "u32", "u32"], a, s, ln).tolist() == want
    assert run("bfi.b32 %d, %s0, %s1, %s2, %s3;", "b32", ["b32"] * 4, a, b, s, ln).tolist() == [
        (y & ~((((1 << n) - 1) << p) & M)) | ((x & ((1 << n) - 1)) << p) & M for x, y, p, n in zip(A, B, S, L)
    ]
    assert run("popc.b32 %d, %s0;", "u32", ["b32"], a).tolist() == [bin(x).count("1") for x in A]
    assert run("clz.b32 %d, %s0;", "u32", ["b32"], a).tolist() == [32 - x.bit_length() for x in A]
    assert run("brev.b32 %d, %s0;", "b32", ["b32"], a).tolist() == [int(f"{x:032b}"[::-1], 2) for x in A]
    assert run("bfind.u32 %d, %s0;", "u32", ["u32"], a).tolist() == [(x.bit_length() - 1) & M for x in A]


def test_prmt_lop3():
    a, b, c = ints(32), ints(32), ints(32)
    want = []
    for x, y, s in zip(a.tolist(), b.tolist(), c.tolist()):
        v, r = (y << 32) | x, 0
        for k in range(4):
            n = (s >> (4 * k)) & 15
            byte = (v >> (8 * (n & 7))) & 255
            if n & 8:
                byte = 255 if byte & 128 else 0
            r |= byte << (8 * k)
        want.append(r)
    assert run("prmt.b32 %d, %s0, %s1, %s2;", "b32", ["b32"] * 3, a, b, c).tolist() == want
    for lut in (0x80, 0xE8, 0x96, 0x1B, 0xC0):
        got = run("lop3.b32 %%d, %%s0, %%s1, %%s2, %d;" % lut, "b32", ["b32"] * 3, a, b, c)
        want = np.zeros(N, np.uint32)
        for k in range(8):
            if lut >> k & 1:
                want |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        assert (got == want).all()
    # With a predicate of the result being other than zero, combined with another one; both results or the second alone.
    small = [x & np.uint32(3) for x in (a, b, c)]
    code = "{ .reg .pred p, q; .reg .b32 x; setp.ne.u32 q, %%s2, 0; lop3.%s.b32 %s|p, %%s0, %%s1, 0, 0xC0, %s; selp.b32 %%d, 1, 0, p; }"
    for op, sink, q in (("or", "_", "0"), ("or", "x", "q"), ("and", "x", "q"), ("and", "_", "!q")):
        got = run(code % (op, sink, q), "b32", ["b32"] * 3, *small)
        other = {"0": np.zeros(N, bool), "q": small[2] != 0, "!q": small[2] == 0}[q]
        set_ = (small[0] & small[1]) != 0
        assert (got == (set_ | other if op == "or" else set_ & other)).all(), (op, sink, q)


def test_dp4a():
    a, b, c = ints(32), ints(32), ints(32, True)
    got = run("dp4a.s32.u32 %d, %s0, %s1, %s2;", "s32", ["s32", "u32", "s32"], a, b, c)
    want = c.astype(np.int64) + (a.view(np.int8).reshape(-1, 4).astype(np.int64) * b.view(np.uint8).reshape(-1, 4)).sum(
        1
    )
    assert (got == (want & 0xFFFFFFFF).astype(np.uint32)).all()


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "fma"])
def test_f32(op):
    a, b, c = floats32(), floats32()[::-1].copy(), floats32()
    with np.errstate(all="ignore"):
        if op == "fma":
            got = run("fma.rn.f32 %d, %s0, %s1, %s2;", "f32", ["f32"] * 3, a, b, c).view(np.float32)
            want = np.array([fma32(x, y, z) for x, y, z in zip(a, b, c)], np.float32)
        else:
            got = run("%s.rn.f32 %%d, %%s0, %%s1;" % op, "f32", ["f32"] * 2, a, b).view(np.float32)
            want = {"add": a + b, "sub": a - b, "mul": a * b, "div": a / b}[op]
    same_float(got, want)


def fma32(x, y, z):
    """Exact fused multiply-add through rational arithmetic."""
    from fractions import Fraction

    x, y, z = float(x), float(y), float(z)
    if not all(map(np.isfinite, (x, y, z))):
        with np.errstate(all="ignore"):
            return np.float32(np.float64(x) * np.float64(y) + np.float64(z))
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if exact == 0:
        return np.float32(x * y + z)
    return round_to(exact, 24, -149, np.float32)


def round_to(q, prec, emin, dtype, mode="n"):
    """Rounds a nonzero rational to a binary format: nearest even, zero, up, down."""
    from fractions import Fraction

    s, q = (-1, -q) if q < 0 else (1, q)
    e = q.numerator.bit_length() - q.denominator.bit_length()
    if Fraction(2) ** e > q:
        e -= 1
    ulp = Fraction(2) ** max(e - prec + 1, emin)
    n, r = divmod(q, ulp)
    if mode == "n":
        n += 1 if r * 2 > ulp or (r * 2 == ulp and n & 1) else 0
    elif ((mode == "p" and s > 0) or (mode == "m" and s < 0)) and r:
        n += 1
    v = s * float(n * ulp)
    big = float(np.finfo(dtype).max) if dtype != "bf16" else float(from_bf16(np.uint16(0x7F7F)))
    if abs(v) > big:
        if mode == "z" or (mode == "m" and s > 0) or (mode == "p" and s < 0):
            return s * big
        return s * np.inf
    return v


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "mul"])
def test_f32_directed(op, mode):
    from fractions import Fraction

    a, b = floats32(512), floats32(512)[::-1].copy()
    a, b = np.nan_to_num(a, nan=1, posinf=2, neginf=3), np.nan_to_num(b, nan=1, posinf=2, neginf=3)
    got = run("%s.%s.f32 %%d, %%s0, %%s1;" % (op, mode), "f32", ["f32"] * 2, a, b).view(np.float32)
    for g, x, y in zip(got, a, b):
        q = Fraction(float(x)) + Fraction(float(y)) if op == "add" else Fraction(float(x)) * Fraction(float(y))
        if q:
            assert g == np.float32(round_to(q, 24, -149, np.float32, mode[1])), (x, y)


def test_ftz_and_sat():
    a, b = floats32(), np.ones(N, np.float32)
    got = run("mul.rn.ftz.f32 %d, %s0, %s1;", "f32", ["f32"] * 2, a, b).view(np.float32)
    same_float(got, np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a))
    got = run("mul.rn.sat.f32 %d, %s0, %s1;", "f32", ["f32"] * 2, a, b).view(np.float32)
    want = np.where(np.isnan(a), np.float32(0), np.clip(a, 0, 1))
    assert (got == want).all()


def test_f32_minmax():
    a, b = floats32(), floats32()[::-1].copy()
    a[0], b[0], a[1], b[1] = 0.0, -0.0, -0.0, 0.0
    for op, f in (("min", np.fmin), ("max", np.fmax)):
        got = run("%s.f32 %%d, %%s0, %%s1;" % op, "f32", ["f32"] * 2, a, b).view(np.float32)
        want = f(a, b)
        want[:2] = -0.0 if op == "min" else 0.0
        same_float(got, want)
        got = run("%s.NaN.f32 %%d, %%s0, %%s1;" % op, "f32", ["f32"] * 2, a, b)
        assert (got[np.isnan(a) | np.isnan(b)] == 0x7FFFFFFF).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_f16(op, packed):
    a, b, c = (halves() for _ in range(3))
    t = "f16x2" if packed else "f16"
    v = (lambda x: x.view(np.uint32)) if packed else (lambda x: x)
    A, B, C = (x.view(np.float16).astype(np.float64) for x in (a, b, c))
    with np.errstate(all="ignore"):
        # binary64 holds the exact result of these operations on halves that stay finite
        want = {"add": A + B, "sub": A - B, "mul": A * B, "fma": A * B + C}[op].astype(np.float16)
    if op == "fma":
        arrays = [v(x) for x in (a, b, c)]
        pad = [np.resize(x, N // 2 if packed else N) for x in arrays]
        got = run("fma.rn.%s %%d, %%s0, %%s1, %%s2;" % t, t, [t] * 3, *pad)
    else:
        got = run("%s.rn.%s %%d, %%s0, %%s1;" % (op, t), t, [t] * 2, v(a), v(b))
    same_float(got.view(np.float16), want)


@pytest.mark.parametrize("op", ["add", "mul", "fma"])
def test_bf16(op):
    from fractions import Fraction

    a, b, c = (rng.integers(0, 1 << 16, 1024).astype(np.uint16) for _ in range(3))
    b[:300] = (a[:300] & 0x7F80) ^ b[:300] & 0x807F  # near exponents
    if op == "fma":
        got = run("fma.rn.bf16 %d, %s0, %s1, %s2;", "bf16", ["bf16"] * 3, a, b, c)
    else:
        got = run("%s.rn.bf16 %%d, %%s0, %%s1;" % op, "bf16", ["bf16"] * 2, a, b)
    for g, x, y, z in zip(from_bf16(got), *(from_bf16(k).tolist() for k in (a, b, c))):
        args = (x, y, z) if op == "fma" else (x, y)
        if not all(map(np.isfinite, args)):
            continue
        q = {
            "add": lambda: Fraction(x) + Fraction(y),
            "mul": lambda: Fraction(x) * Fraction(y),
            "fma": lambda: Fraction(x) * Fraction(y) + Fraction(z),
        }[op]()
        if q:
            assert g == round_to(q, 8, -133, "bf16"), (x, y, z)


def test_cvt_f32_to_narrow():
    a = floats32()
    a[1024:3072] = (
        (rng.integers(0, 1 << 16, 2048) * 65536 + 0x8000 + rng.integers(-1, 2, 2048)).astype(np.uint32).view(np.float32)
    )
    with np.errstate(all="ignore"):
        same_float(run("cvt.rn.f16.f32 %d, %s0;", "f16", ["f32"], a).view(np.float16), a.astype(np.float16))
    got, want = run("cvt.rn.bf16.f32 %d, %s0;", "bf16", ["f32"], a), to_bf16(a)
    assert (got == want).all()
    got = run("cvt.rn.bf16x2.f32 %d, %s0, %s1;", "b32", ["f32", "f32"], a, a[::-1].copy())
    assert (got >> 16 == to_bf16(a)).all() and ((got & 0xFFFF) == to_bf16(a[::-1])).all()
    from fractions import Fraction

    b = np.nan_to_num(a, nan=1.5, posinf=1, neginf=1)
    for t, prec, emin, dt in (("f16", 11, -24, np.float16), ("bf16", 8, -133, "bf16")):
        got = run("cvt.rz.%s.f32 %%d, %%s0;" % t, t, ["f32"], b)
        got = got.view(np.float16) if t == "f16" else from_bf16(got)
        for g, x in zip(got.astype(np.float64), b.tolist()):
            if x:
                assert g == round_to(Fraction(x), prec, emin, dt, "z"), x


def test_cvt_halves_exhaustive():
    h = np.arange(65536).astype(np.uint16)
    same_float(run("cvt.f32.f16 %d, %s0;", "f32", ["f16"], h).view(np.float32), h.view(np.float16).astype(np.float32))
    same_float(run("cvt.f32.bf16 %d, %s0;", "f32", ["bf16"], h).view(np.float32), from_bf16(h))


def test_cvt_float_int():
    a = floats32()
    a[2000:3000] = rng.uniform(-3e9, 3e9, 1000)
    a[3000:3500] = rng.integers(-200, 200, 500) / 2
    for mode, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        x = np.where(np.isnan(a), 0, f(a.astype(np.float64)))
        got = run("cvt.%s.s32.f32 %%d, %%s0;" % mode, "s32", ["f32"], a).view(np.int32)
        assert (got == np.clip(x, -(2**31), 2**31 - 1).astype(np.int64)).all()
        got = run("cvt.%s.u32.f32 %%d, %%s0;" % mode, "u32", ["f32"], a)
        assert (got == np.clip(x, 0, 2**32 - 1).astype(np.int64)).all()
        got = run("cvt.%s.f32.f32 %%d, %%s0;" % mode, "f32", ["f32"], a).view(np.float32)
        same_float(got, f(a))
    i = ints(64, True)
    got = run("cvt.rn.f32.s64 %d, %s0;", "f32", ["s64"], i).view(np.float32)
    from fractions import Fraction

    assert got.tolist() == [round_to(Fraction(v), 24, -149, np.float32) if v else 0 for v in i.tolist()]
    i = ints(32, True)
    for mode in "nzmp":
        got = run("cvt.r%s.f16.s32 %%d, %%s0;" % mode, "f16", ["s32"], i).view(np.float16)
        want = [round_to(Fraction(v), 11, -24, np.float16, mode) if v else 0 for v in i.tolist()]
        assert got.astype(np.float64).tolist() == want


def test_cvt_int_int():
    a = ints(32, True)
    assert (run("cvt.s64.s32 %d, %s0;", "s64", ["s32"], a).view(np.int64) == a).all()
    assert (run("cvt.u32.u8 %d, %s0;", "u32", ["b32"], a.view(np.uint32)) == (a.view(np.uint32) & 255)).all()
    assert (run("cvt.s32.s8 %d, %s0;", "s32", ["b32"], a.view(np.uint32)).view(np.int32) == a.astype(np.int8)).all()
    assert (run("cvt.sat.s8.s32 %d, %s0;", "b32", ["s32"], a).view(np.int32) == np.clip(a, -128, 127)).all()
    assert (run("cvt.sat.u16.s32 %d, %s0;", "b16", ["s32"], a) == np.clip(a, 0, 65535)).all()


def test_setp_nan_and_selp():
    a, b = floats32(), floats32()[::-1].copy()
    b[::7] = a[::7]
    un = np.isnan(a) | np.isnan(b)
    with np.errstate(all="ignore"):
        for cmp, want in (
            ("eq", a == b),
            ("ne", (a != b) & ~un),
            ("lt", a < b),
            ("ge", a >= b),
            ("equ", un | (a == b)),
            ("neu", un | (a != b)),
            ("ltu", un | (a < b)),
            ("geu", un | (a >= b)),
            ("num", ~un),
            ("nan", un),
        ):
            got = run("setp.%s.f32 %%p, %%s0, %%s1; selp.b32 %%d, 1, 0, %%p;" % cmp, "b32", ["f32"] * 2, a, b)
            assert (got == want).all(), cmp


def test_special_functions():
    x = rng.uniform(-8, 8, N).astype(np.float32)
    p = np.abs(x) + np.float32(0.01)
    for op, arg, f in (
        ("ex2.approx.ftz", x, np.exp2),
        ("lg2.approx.ftz", p, np.log2),
        ("sin.approx", x, np.sin),
        ("cos.approx", x, np.cos),
        ("rcp.approx.ftz", p, lambda v: 1 / v),
        ("rsqrt.approx.ftz", p, lambda v: 1 / np.sqrt(v)),
        ("sqrt.rn", p, np.sqrt),
        ("tanh.approx", x, np.tanh),
    ):
        got = run("%s.f32 %%d, %%s0;" % op, "f32", ["f32"], arg).view(np.float32)
        np.testing.assert_allclose(got, f(arg.astype(np.float64)), rtol=3e-6, atol=1e-6)


def test_fp8():
    def e4m3(v):
        s, e, m = v >> 7, v >> 3 & 15, v & 7
        if v & 0x7F == 0x7F:
            return np.nan
        f = (1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6
        return -f if s else f

    table = np.array([e4m3(v) for v in range(128)])
    finite = table[:127]
    x = np.concatenate([rng.uniform(-500, 500, N // 2), rng.uniform(-0.1, 0.1, N // 2)]).astype(np.float32)
    got = run("cvt.rn.satfinite.e4m3x2.f32 %d, %s0, %s1;", "b16", ["f32", "f32"], x, x)
    assert (got >> 8 == got & 255).all()
    for g, v in zip((got & 255).tolist(), x.tolist()):
        d = np.abs(finite - abs(v))
        best = d.min()
        cand = [k for k in range(127) if d[k] == best]
        k = g & 127
        assert k in cand and (len(cand) == 1 or k % 2 == 0) and (g >> 7) == (v < 0), (v, g)


def test_unknown_instruction_is_an_error():
    with pytest.raises(cudasim.CudaSimError, match="frobnicate"):
        run("frobnicate.u32 %d, %s0;", "u32", ["u32"], ints(32))
    with pytest.raises(cudasim.CudaSimError, match="not supported"):
        run("add.fancy.u32 %d, %s0, %s0;", "u32", ["u32"], ints(32))
