"""Broken kernels must be caught, their correct versions must pass in silence."""

import numpy as np
import pytest
from conftest import Buffer, compile_cuda

import cudasim

rng = np.random.default_rng(11)


@pytest.fixture(scope="module")
def so():
    return compile_cuda("faults.cu")


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_missing_barrier(so, seed, capfd):
    cudasim.set_seed(seed)
    o = Buffer(np.zeros(256, np.int32))
    assert so.f_exchange(o, 1) == 0 and cudasim.race_count() == 0
    assert o.get()[:128].tolist() == list(range(127, -1, -1))
    assert so.f_exchange(o, 0) == 0
    assert cudasim.race_count() >= 1
    err = capfd.readouterr().err
    assert "race in kernel void exchange" in err and "st.shared" in err and "ld.shared" in err
    assert cudasim.stats()[-1]["races"] >= 1


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_missing_barrier_before_reuse(so, seed):
    cudasim.set_seed(seed)
    o = Buffer(np.zeros(256, np.int32))
    assert so.f_reuse(o, 1) == 0 and cudasim.race_count() == 0
    assert so.f_reuse(o, 0) == 0 and cudasim.race_count() >= 1


def test_race_can_fail_the_launch(so):
    cudasim.set_race_mode(2)
    o = Buffer(np.zeros(256, np.int32))
    assert so.f_exchange(o, 1) == 0
    assert so.f_exchange(o, 0) == 719


def test_bytes_of_one_word_do_not_race(so):
    o = Buffer(np.zeros(128, np.int32))
    assert so.f_bytes(o) == 0 and cudasim.race_count() == 0
    assert sorted(o.get().tolist()) == list(range(128))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cp_async_pipeline(so, seed):
    cudasim.set_seed(seed)
    a = rng.standard_normal((6, 64, 4)).astype(np.float32)
    o = Buffer(np.zeros_like(a))
    want = a[:, ::-1].copy()
    want[:, :, 0] += 1
    assert so.f_pipeline(Buffer(a), o, 6, 1) == 0
    assert (o.get() == want).all() and cudasim.race_count() == 0


def test_missing_cp_async_wait(so):
    a = rng.standard_normal((6, 64, 4)).astype(np.float32)
    o = Buffer(np.zeros_like(a))
    want = a[:, ::-1].copy()
    want[:, :, 0] += 1
    assert so.f_pipeline(Buffer(a), o, 6, 2) == 0
    assert not (o.get() == want).all()


def fault(code, *parts):
    f = cudasim.last_fault()
    assert cudasim.lib().cudasim_last_fault_code() == code
    for p in parts:
        assert p in f, f
    cudasim.clear_fault()


def test_global_out_of_bounds(so):
    p = Buffer(np.zeros(100, np.float32))
    assert so.f_store(p, 99) == 0
    assert so.f_store(p, __import__("ctypes").c_longlong(100)) == 700
    fault(
        700,
        "kernel store_at(float*, long long)",
        "thread (5,0,0)",
        "st.global.u32",
        "the address is 0 bytes past its end",
    )
    assert so.f_store(p, __import__("ctypes").c_longlong(1 << 50)) == 700
    fault(700, "nearest allocation")


def test_unmapped_address_without_strict_mode(so):
    cudasim.set_strict(0)
    p = Buffer(np.zeros(100, np.float32))
    assert so.f_store(p, __import__("ctypes").c_longlong(1 << 42)) == 700
    fault(700, "store_at", "PTX line")


def test_registered_range(so):
    a = np.zeros(100, np.float32)
    assert so.f_store(a.ctypes.data_as(__import__("ctypes").c_void_p), 3) == 700
    cudasim.clear_fault()
    cudasim.register(a.ctypes.data, a.nbytes, "my array")
    assert so.f_store(a.ctypes.data_as(__import__("ctypes").c_void_p), 3) == 0
    assert a[3] == 1
    cudasim.unregister(a.ctypes.data)


def test_shared_out_of_bounds(so):
    p = Buffer(np.zeros(32, np.float32))
    assert so.f_shared(p, 0, 128) == 0
    assert so.f_shared(p, 1, 128) == 700
    fault(700, "shared access of 4 bytes at offset 128", "has 128 bytes")
    assert so.f_shared(p, -1, 128) == 700


def test_strict_once_the_program_allocates(so):
    """In a process of its own: host memory is fine until cudaMalloc is called, unless strictness is off."""
    import os
    import subprocess
    import sys

    here = os.path.dirname(os.path.abspath(__file__))
    code = (
        "import ctypes; s = ctypes.CDLL(%r); c = ctypes.CDLL('libcudart.so.13'); h = (ctypes.c_float * 1024)(); p = ctypes.c_void_p();"
        "r = [s.f_store(h, ctypes.c_longlong(3)), c.cudaMalloc(ctypes.byref(p), ctypes.c_size_t(400)), s.f_store(p, ctypes.c_longlong(99))];"
        "r += [s.f_store(p, ctypes.c_longlong(100)), c.cudaGetLastError() * 0, s.f_store(h, ctypes.c_longlong(3))];"
        "c.cudaGetLastError(); c.cudaFree(p); import os; r.append(0 if 'CUDASIM_STRICT' in os.environ else s.f_store(p, ctypes.c_longlong(3)));"
        "print(*r)" % so._name
    )
    env = {k: v for k, v in os.environ.items() if k != "CUDASIM_STRICT"}
    run = lambda env: subprocess.run(
        [os.path.join(here, "..", "run"), sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
    )
    r = run(env)
    assert r.stdout == "0 0 0 700 0 700 700\n", r
    assert "0 bytes past its end" in r.stderr and "CUDASIM_STRICT=0" in r.stderr
    assert run(dict(env, CUDASIM_STRICT="0")).stdout == "0 0 0 0 0 0 0\n"


def test_long_names_are_cut():
    from test_ptx_async import kernel

    name = "k" * 400
    text = kernel([], "trap;").replace("entry k(", "entry %s(" % name)
    with pytest.raises(cudasim.CudaSimError) as e:
        cudasim.Module(text).function(name).launch(1, 1, [])
    assert "k" * 157 + "..." in str(e.value) and "k" * 158 not in str(e.value)


def test_stream_capture(so):
    o, copy = Buffer(np.zeros(128, np.int32)), Buffer(np.full(128, -1, np.int32))
    replays, status = np.zeros(4, np.int32), np.zeros(1, np.int32)
    ptr = lambda a: a.ctypes.data_as(__import__("ctypes").c_void_p)
    assert so.f_capture(o, copy, ptr(replays), ptr(status)) == 900  # cudaErrorStreamCaptureUnsupported
    assert status[0] == 1 and replays.tolist() == [-1, 126, 126, 901]
    assert copy.get().tolist() == list(range(127, -1, -1))


def test_ptx_version_of_a_kernel(so):
    """The embedded PTX is for sm_80, the device newer."""
    assert so.f_versions() == 80 * 1000 + 90


def test_access_that_sticks_out():
    from test_ptx_async import kernel

    body = ".reg .b64 %a; ld.param.u64 %a, [p]; .reg .b64 %v; ld.global.u64 %v, [%a+8];"
    b = Buffer(np.zeros(3, np.uint32))
    with pytest.raises(cudasim.CudaSimError, match="8 bytes into 'cudaMalloc' .*, and ends 4 bytes past its end"):
        cudasim.Module(kernel(["p"], body)).function("k").launch(1, 1, [b.ptr])


@pytest.mark.parametrize(
    "mode, counted", [("bfly.b32 %v, %t, 16, 31", 1), ("idx.b32 %v, %t, 31, 31", 1), ("down.b32 %v, %t, 16, 31", 0)]
)
@pytest.mark.parametrize(
    "threads, mask, why",
    [(32, -1, "has exited"), (16, -1, "has exited or does not exist"), (32, 0xFFFF, "not in the member mask")],
)
def test_shuffle_from_absent_lane(mode, counted, threads, mask, why, capfd):
    from test_ptx_async import kernel

    body = """.reg .b32 %%t, %%v; .reg .pred %%p; mov.u32 %%t, %%tid.x; setp.ge.u32 %%p, %%t, 16; @%%p exit;
L: shfl.sync.%s, %d; add.u32 %%t, %%t, 16; setp.lt.u32 %%p, %%t, 32; @%%p bra L;""" % (mode, mask)
    cudasim.Module(kernel([], body)).function("k").launch(1, threads, [])
    err = capfd.readouterr().err
    assert err.count("shfl.sync reads lane") == 1 and why in err
    assert cudasim.race_count() == counted
    cudasim.reset_races()
    full = ".reg .b32 %%t, %%v; mov.u32 %%t, %%tid.x; shfl.sync.%s, -1;" % mode
    cudasim.Module(kernel([], full)).function("k").launch(1, 32, [])
    assert cudasim.race_count() == 0 and "shfl" not in capfd.readouterr().err


def test_misaligned(so):
    assert so.f_misaligned(Buffer(np.zeros(32, np.float32))) == 716
    fault(716, "misaligned")


def test_local_out_of_bounds(so):
    p = Buffer(np.zeros(1, np.int32))
    assert so.f_local(p, 8) == 0
    assert so.f_local(p, 100) == 700
    fault(700, "local access")


def test_lane_outside_member_mask(so):
    assert so.f_shfl(Buffer(np.zeros(32, np.int32))) == 715
    fault(715, "member mask 000000ff")


def test_shared_memory_is_poisoned(so):
    p = Buffer(np.zeros(64, np.float32))
    assert so.f_uninit(p) == 0
    r = p.get()
    assert (r[:32] == 1).all() and np.isnan(r[32:]).all()


def test_launch_limits(so):
    p = Buffer(np.zeros(2048, np.float32))
    assert so.f_limits(p, 1025, 16) == 9
    assert so.f_limits(p, 32, 50000) == 1
    assert so.f_limits(p, 32, 48000) == 0


def test_global_race_and_slices(so, capfd):
    cudasim.set_race_global(True)
    o = Buffer(np.zeros(128, np.int32))
    assert so.f_flag(Buffer(np.zeros(1, np.int32)), o, 1) == 0 and cudasim.race_count() == 0
    assert so.f_flag(Buffer(np.zeros(1, np.int32)), o, 0) == 0 and cudasim.race_count() >= 1
    assert "global memory 0x" in capfd.readouterr().err
    cudasim.set_race_global(False)
    assert o.get()[127] == 1  # warp 0 ran ahead
    cudasim.set_slice(1)
    assert so.f_flag(Buffer(np.zeros(1, np.int32)), o, 0) == 0
    cudasim.set_slice(192)
    assert (o.get() == 0).all()


def test_environment(so, tmp_path):
    """CUDASIM_STATS, CUDASIM_UNINIT and CUDASIM_RACE=2 in a program started by `run`."""
    import json
    import os
    import subprocess
    import sys

    here = os.path.dirname(os.path.abspath(__file__))
    code = (
        "import ctypes; s = ctypes.CDLL(%r); p = ctypes.c_void_p(); c = ctypes.CDLL('libcudart.so.13');"
        "c.cudaMalloc(ctypes.byref(p), ctypes.c_size_t(1024)); print(s.f_uninit(p), s.f_exchange(p, 0))" % so._name
    )
    env = dict(os.environ, CUDASIM_STATS=str(tmp_path / "s.json"), CUDASIM_UNINIT="1", CUDASIM_RACE="2")

    def program():
        command = [os.path.join(here, "..", "run"), sys.executable, "-c", code]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    r = program()
    assert r.stdout == "719 719\n", r
    assert r.stderr.count("never written") >= 2
    del env["CUDASIM_RACE"]
    env["CI"] = "true"  # makes failing the default
    r = program()
    assert r.stdout == "719 719\n", r
    env["CUDASIM_RACE"] = "1"
    r = program()
    assert r.stdout == "0 0\n"
    st = json.load(open(tmp_path / "s.json"))
    assert [s["kernel"].split("(")[0] for s in st] == ["uninit", "void exchange<false>"]
