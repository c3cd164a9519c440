"""TMA, mbarriers, wgmma and clusters (sm_90a)."""

import numpy as np
import pytest
from conftest import Buffer, compile_cuda, from_bf16, to_bf16

import cudasim

rng = np.random.default_rng(2)


@pytest.fixture(scope="module")
def so():
    return compile_cuda("hopper.cu", "90a")


def gemm(so, m, n, k, trans=0, bug=0):
    a, b = to_bf16(rng.standard_normal((m, k))), to_bf16(rng.standard_normal((n, k)))
    A, B = Buffer(a), Buffer(np.ascontiguousarray(b.T) if trans else b)
    c = Buffer(np.full((m, n), 0x7FFF, np.uint16))
    rc = so.h_gemm(A, B, c, m, n, k, trans, bug)
    ref = from_bf16(a).astype(np.float64) @ from_bf16(b).T
    got = from_bf16(c.get())
    good = rc == 0 and np.isfinite(got).all() and (np.abs(got - ref) <= 0.01 * (np.abs(ref) + 1)).all()
    return rc, good


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("trans", [0, 1])
def test_warp_specialised_gemm(so, trans, seed):
    cudasim.set_seed(seed)
    rc, good = gemm(so, 128, 192, 512, trans)
    assert rc == 0 and good, cudasim.last_fault()
    assert cudasim.race_count() == 0
    assert cudasim.stats()[-1]["mma_flops"] == 2 * 128 * 192 * 512


def test_out_of_bounds_tiles(so):
    rc, good = gemm(so, 72, 88, 64 * 3)
    assert rc == 0 and good and cudasim.race_count() == 0


@pytest.mark.parametrize("bug", [1, 2, 3, 4])
def test_broken_pipelines_are_caught(so, bug):
    caught = 0
    for seed in range(4):
        cudasim.set_seed(seed)
        cudasim.reset_races()
        rc, good = gemm(so, 64, 64, 64 * 12, 0, bug)
        caught += rc != 0 or not good or cudasim.race_count() > 0
        cudasim.clear_fault()
    assert caught == 4


@pytest.mark.parametrize("mode,cols", [(0, 64), (1, 16), (2, 32), (3, 64)])
def test_swizzle_modes(so, mode, cols):
    src = rng.integers(0, 65536, (40, 72)).astype(np.uint16)
    o = Buffer(np.zeros((16, cols), np.uint16))
    x, y = 8, 30  # rows 40.. and columns 72.. are outside
    assert so.h_swizzle(Buffer(src), o, 40, 72, 16, cols, mode, x, y) == 0, cudasim.last_fault()
    want = np.zeros((16, cols), np.uint16)
    part = src[y : y + 16, x : x + cols]
    want[: part.shape[0], : part.shape[1]] = part
    raw = np.zeros(16 * cols, np.uint16)
    span = {0: 0, 1: 1, 2: 3, 3: 7}[mode]
    for r in range(16):
        for c in range(cols):
            addr = (r * cols + c) * 2
            addr ^= ((addr >> 7) & span) << 4
            raw[addr // 2] = want[r, c]
    assert (o.get().ravel() == raw).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_cluster(so, seed):
    cudasim.set_seed(seed)
    o = Buffer(np.zeros((4, 64), np.int32))
    assert so.h_exchange(o) == 0, cudasim.last_fault()
    assert o.get().tolist() == [[1000 * (b ^ 1) + 63 - i for i in range(64)] for b in range(4)]
    i, o = Buffer(np.arange(64, dtype=np.int32)), Buffer(np.zeros((2, 64), np.int32))
    assert so.h_multicast(i, o) == 0, cudasim.last_fault()
    assert o.get().tolist() == [list(range(64)), list(range(1, 65))]
    assert cudasim.race_count() == 0


def test_bulk_store_and_proxy_fence(so, capfd):
    o = Buffer(np.zeros(64, np.int32))
    assert so.h_bulk(o, 1) == 0 and o.get().tolist() == [3 * i for i in range(64)]
    assert cudasim.race_count() == 0
    assert so.h_bulk(o, 0) == 0 and cudasim.race_count() >= 1
    assert "missing fence.proxy.async" in capfd.readouterr().err


def test_bulk_store_reads_late(so):
    o = Buffer(np.zeros(64, np.int32))
    assert so.h_overwritten(o) == 0
    assert o.get().tolist() == [-1] * 64


def test_bulk_reduction(so):
    o = Buffer(np.ones(32, np.float32))
    assert so.h_reduce(o) == 0
    assert o.get().tolist() == [1 + 3 * (i + 0.5) for i in range(32)]


def test_mbarrier_errors(so):
    assert so.h_never() == 702
    assert "deadlock in kernel never_complete()" in cudasim.last_fault() and "mbarrier.try_wait" in cudasim.last_fault()
    cudasim.clear_fault()
    assert so.h_no_init() == 715
    assert "no initialised mbarrier" in cudasim.last_fault()
