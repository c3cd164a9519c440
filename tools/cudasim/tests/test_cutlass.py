"""CUTLASS kernels known to work on real devices. Needs CUTLASS_DIR, a directory
that holds include/ (and tools/util/include/, or CUTLASS_UTIL_DIR)."""

import ctypes
import os

import numpy as np
import pytest
from conftest import Buffer, compile_cuda, from_bf16, to_bf16

import cudasim

DIR = os.environ.get("CUTLASS_DIR")
pytestmark = pytest.mark.skipif(not DIR, reason="CUTLASS_DIR is not set")
rng = np.random.default_rng(3)


def build(source, arch, *defs):
    flags = [
        "--expt-relaxed-constexpr",
        "-I" + os.path.join(DIR, "include"),
        "-I" + os.path.join(DIR, "tools/util/include"),
    ]
    return compile_cuda(source, arch, tuple(flags) + defs)


def problem(m, n, k, b_row_major):
    a, b, c = (
        to_bf16(rng.standard_normal((m, k))),
        to_bf16(rng.standard_normal((n, k))),
        to_bf16(rng.standard_normal((m, n))),
    )
    ref = from_bf16(a).astype(np.float64) @ from_bf16(b).T + 0.5 * from_bf16(c)
    d = Buffer(np.full((m, n), 0x7FFF, np.uint16))
    return Buffer(a), Buffer(np.ascontiguousarray(b.T) if b_row_major else b), Buffer(c), d, ref


def check(d, ref):
    if ref.size == 0:
        return
    err = np.abs(from_bf16(d.get()) - ref) / (np.abs(ref) + 1)
    assert np.isfinite(err).all() and err.max() < 0.005


def check_gemm(so, m, n, k, b_row_major=False):
    a, b, c, d, ref = problem(m, n, k, b_row_major)
    ws = Buffer(np.zeros(1 << 20, np.uint8))
    assert so.gemm(a, b, c, d, m, n, k, 1, ws) == 0, cudasim.last_fault()
    check(d, ref)
    assert cudasim.race_count() == 0
    assert cudasim.stats()[-1]["mma_flops"] >= 2 * m * n * k


def check_grouped(so, sizes, b_row_major=False):
    ps = [problem(*s, b_row_major) for s in sizes]
    ptrs = [(ctypes.c_void_p * len(ps))(*[p[i].ptr for p in ps]) for i in range(4)]
    mnk = (ctypes.c_int * (3 * len(ps)))(*[x for s in sizes for x in s])
    assert so.grouped(len(ps), mnk, *ptrs) == 0, cudasim.last_fault()
    for p in ps:
        check(p[3], p[4])
    assert cudasim.race_count() == 0


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", [(256, 128, 96), (200, 136, 264)])
def test_sm80_gemm(shape, seed):
    cudasim.set_seed(seed)
    check_gemm(build("cutlass_sm80.cu", "80"), *shape)


@pytest.mark.parametrize("seed", [0, 1])
def test_sm80_grouped(seed):
    cudasim.set_seed(seed)
    check_grouped(
        build("cutlass_sm80.cu", "80"), [(64, 64, 64), (40, 128, 72), (0, 64, 64), (130, 72, 32), (8, 8, 256)]
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", [(256, 256, 192), (200, 136, 264)])
def test_sm90_pingpong(shape, seed):
    cudasim.set_seed(seed)
    check_gemm(build("cutlass_sm90.cu", "90a"), *shape)


@pytest.mark.parametrize("seed", [0, 1])
def test_sm90_cooperative_cluster_multicast(seed):
    cudasim.set_seed(seed)
    so = build("cutlass_sm90.cu", "90a", "-DCLUSTER_M=2", "-DCOOPERATIVE", "-DB_ROW_MAJOR")
    check_gemm(so, 384, 256, 320, True)


@pytest.mark.parametrize("seed", [0, 1])
def test_sm90_ptr_array_grouped(seed):
    cudasim.set_seed(seed)
    so = build("cutlass_sm90.cu", "90a", "-DGROUPED")
    check_grouped(so, [(128, 128, 64), (96, 264, 128), (0, 128, 64), (300, 136, 72)])
