"""Ordinary CUDA kernels, compiled with nvcc for sm_80."""

import numpy as np
import pytest
from conftest import Buffer, compile_cuda, from_bf16, to_bf16

import cudasim

rng = np.random.default_rng(7)


@pytest.fixture(scope="module")
def so():
    return compile_cuda("basic.cu")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_vadd(so, seed):
    cudasim.set_seed(seed)
    a, b = rng.standard_normal(1000).astype(np.float32), rng.standard_normal(1000).astype(np.float32)
    c = Buffer(np.zeros(1000, np.float32))
    assert so.l_vadd(Buffer(a), Buffer(b), c, 1000) == 0
    assert (c.get() == a + b).all()
    st = cudasim.stats()[-1]
    assert st["unique_bytes_read"] == 8000 and st["unique_bytes_written"] == 4000
    assert st["global_load_sectors"] == 250 and st["global_store_sectors"] == 125


def test_sum(so):
    a = rng.standard_normal(5000).astype(np.float32)
    o = Buffer(np.zeros(1, np.float32))
    assert so.l_sum(Buffer(a), o, 5000) == 0
    assert abs(o.get()[0] - a.astype(np.float64).sum()) < 1e-3


def test_histogram(so):
    a = rng.integers(0, 1000, 3000).astype(np.int32)
    h = Buffer(np.zeros(64, np.uint32))
    assert so.l_hist(Buffer(a), 3000, h) == 0
    assert (h.get() == np.bincount(a & 63, minlength=64)).all()
    assert cudasim.race_count() == 0


def test_atomics(so):
    i, u = Buffer(np.zeros(5, np.int32)), Buffer(np.array([0, 0, 0xFFFFFFFF, 0], np.uint32))
    f, d, l = Buffer(np.zeros(1, np.float32)), Buffer(np.zeros(1)), Buffer(np.zeros(1, np.uint64))
    h, b = Buffer(np.zeros(2, np.float16)), Buffer(np.zeros(2, np.uint16))
    assert so.l_atomics(i, u, f, d, h, b, l) == 0
    x = 0
    for t in range(128):
        x ^= t
    assert i.get().tolist() == [127, -127, 7, 128, x]
    assert u.get()[0] == 128 % 10 and u.get()[2] == 0 and u.get()[3] == 0xFFFFFFFF
    assert f.get()[0] == 64 and d.get()[0] == 32 and l.get()[0] == 128 << 33
    assert h.get().tolist() == [128, 256] and from_bf16(b.get()).tolist() == [128, 64]


def test_divergent(so):
    a = rng.integers(1, 1000, 700).astype(np.int32)
    o = Buffer(np.zeros(700, np.int32))
    assert so.l_divergent(o, Buffer(a), 700) == 0
    want = []
    for i, x in enumerate(a.tolist()):
        s = 0
        while x != 1:
            x = 3 * x + 1 if x & 1 else x >> 1
            s += 1
        r = i % 7
        s = (
            s + 1000
            if r == 0
            else s * 3
            if r == 1
            else s ^ 0x55
            if r == 2
            else s + sum(range(i % 13))
            if r == 3
            else -s
            if r == 4
            else s
        )
        if r == 5:
            s = s - 20 if s > 20 else s + 5
        want.append(s)
    assert o.get().tolist() == want


def test_lock_within_warp(so):
    v = Buffer(np.zeros(1, np.int32))
    assert so.l_lock(Buffer(np.zeros(1, np.int32)), v) == 0
    assert v.get()[0] == 192


def test_local_array(so):
    a = rng.integers(0, 100000, 500).astype(np.int32)
    o = Buffer(np.zeros(64, np.int32))
    assert so.l_local(Buffer(a), o, 500) == 0
    want = [sorted(a[(i * 7 + k) % 500] for k in range(40))[a[i] % 40] for i in range(64)]
    assert o.get().tolist() == want


def test_calls(so):
    a = rng.integers(0, 100, 64).astype(np.int32)
    o, o2 = Buffer(np.zeros(64)), Buffer(np.zeros(64, np.int32))
    assert so.l_calls(Buffer(a), o, o2) == 0
    want = [(a[i] * 2 + 1.5) + (i - a[i]) if i & 1 else 0.25 * 0.5 + a[i] + (3 - i) for i in range(64)]
    assert o.get().tolist() == want
    assert o2.get().tolist() == [i * i if a[i] & 1 else 2 * i for i in range(64)]


def test_printf(so, capfd):
    assert so.l_prints(17) == 0
    assert capfd.readouterr().out == "value 17  1.25 text 123456789abc%\n"


def test_assert_and_trap(so, capfd):
    assert so.l_asserts(4) == 0
    assert so.l_asserts(6) == 710
    assert "n < 5" in cudasim.last_fault()
    cudasim.clear_fault()
    assert so.l_traps() == 719


def test_barriers(so):
    o = Buffer(np.zeros(384, np.int32))
    assert so.l_barriers(o) == 0
    r = o.get()
    assert r[:128].tolist() == list(range(63, -1, -1)) + list(range(127, 63, -1))
    assert (r[128:256] == 43).all() and (r[256:] == 3).all()
    assert cudasim.race_count() == 0


def test_collectives(so):
    o = Buffer(np.zeros(192, np.int32))
    assert so.l_collectives(o) == 0
    r = o.get().reshape(6, 32).tolist()
    assert (np.array(r[0]).astype(np.uint32) == sum(1 << l for l in range(0, 32, 3))).all()
    assert [x & 0xFFFFFFFF for x in r[1]] == [sum(1 << k for k in range(32) if k // 5 == l // 5) for l in range(32)]
    assert r[2] == [496] * 32
    assert r[3] == [((l + 3) & 31) ** 2 for l in range(32)]
    assert r[4] == [(l - 1 if l % 8 else l) + 1 for l in range(16)] + [(l ^ 5) + 100 for l in range(16, 32)]
    assert r[5] == [31] * 32


def test_half_math(so):
    n = 2000
    a, b = (rng.standard_normal(2 * n).astype(np.float16) for _ in range(2))
    x, y = (to_bf16(rng.standard_normal(2 * n)) for _ in range(2))
    o, p = Buffer(np.zeros(2 * n, np.float16)), Buffer(np.zeros(2 * n, np.uint16))
    assert so.l_half(Buffer(a), Buffer(b), o, Buffer(x), Buffer(y), p, n) == 0
    A, B = a.astype(np.float64), b.astype(np.float64)
    assert (o.get() == np.maximum((A * B + (A - B).astype(np.float16)).astype(np.float16), -b)).all()
    X, Y = from_bf16(x), from_bf16(y)
    s = from_bf16(to_bf16(X + Y)).astype(np.float64)
    ref = np.minimum(X.astype(np.float64) * Y + s, np.abs(X))
    assert np.abs(from_bf16(p.get()) - ref).max() <= np.abs(ref).max() / 200


def test_symbols(so):
    import ctypes

    o, c = Buffer(np.zeros(32, np.int32)), ctypes.c_int()
    t = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89] + [0] * 6
    assert so.l_symbols(o, 0, ctypes.byref(c)) == 0
    assert o.get().tolist() == t * 2 and c.value == 37
    t[2] = 1000
    assert so.l_symbols(o, 1, ctypes.byref(c)) == 0
    assert o.get().tolist() == t * 2 and c.value == 69


def test_vector_accesses(so):
    a = rng.uniform(0, 200, (32, 4)).astype(np.float32)
    b, s, c = Buffer(np.zeros((32, 2))), Buffer(np.zeros((32, 4), np.int16)), Buffer(np.zeros(32, np.uint8))
    assert so.l_wide(Buffer(a), b, s, c) == 0
    A = a.astype(np.float64)
    assert (b.get() == np.stack([A[:, 0] + A[:, 1], A[:, 2] * A[:, 3]], 1)).all()
    assert (s.get() == a.astype(np.int16)).all() and (c.get() == a[:, 0].astype(np.uint8)).all()


def test_cooperative_grid_sync(so):
    d = Buffer(np.zeros(256, np.int32))
    assert so.l_grid(d) == 0
    assert d.get().tolist() == [(i + 97) % 256 for i in range(256)]


def test_block_waits_for_later_block(so):
    o = Buffer(np.zeros(1, np.int32))
    assert so.l_later(Buffer(np.zeros(1, np.int32)), o) == 0
    assert o.get()[0] == 42


def test_deadlock_is_reported(so):
    assert so.l_hang_barrier() == 702
    f = cudasim.last_fault()
    assert "deadlock" in f and "bar.sync" in f and "hang_barrier" in f


def test_switch(so):
    a = (np.arange(32) % 12).astype(np.int32)
    o = Buffer(np.zeros(32, np.int32))
    assert so.l_switch(Buffer(a), o) == 0
    t = [10, 77, 5, 123, -4, 65, 9, 1, 33, 2, -1, -1]
    assert o.get().tolist() == [t[v] + (1000 if v <= 4 else 0) for v in a.tolist()]


def test_device_properties(so):
    v = (__import__("ctypes").c_int * 8)()
    assert so.l_props(v) == 0
    assert list(v[:6]) == [132, 227 * 1024, 9, 1, 227 * 1024, 128] and v[6] == 8


def test_statistics_are_deterministic(so):
    a = Buffer(rng.standard_normal(1024).astype(np.float32))
    o = Buffer(np.zeros(256, np.float32))
    res = []
    for _ in range(2):
        cudasim.reset_stats()
        assert so.l_spmv(a, o, 4) == 0
        s = cudasim.stats()[0]
        s.pop("seconds")
        res.append(s)
    assert res[0] == res[1]


def test_two_workers(so):
    a = rng.integers(0, 1000, 30000).astype(np.int32)
    res = []
    for threads in (1, 2):
        cudasim.set_threads(threads)
        cudasim.reset_stats()
        h, l = Buffer(np.zeros(64, np.uint32)), Buffer(np.zeros(1, np.int32))
        assert so.l_hist(Buffer(a), 30000, h) == 0
        assert so.l_lock(Buffer(np.zeros(1, np.int32)), l) == 0 and l.get()[0] == 192
        assert so.l_later(Buffer(np.zeros(1, np.int32)), Buffer(np.zeros(1, np.int32))) == 0
        assert so.l_asserts(6) == 710
        cudasim.clear_fault()
        s = cudasim.stats()[0]
        s.pop("seconds")
        res.append((h.get().tolist(), s))
    assert res[0] == res[1]
