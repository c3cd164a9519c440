"""Shared memory touched while an asynchronous copy of the same warp is under way."""

import numpy as np
import pytest
from conftest import Buffer, compile_cuda
from test_ptx_async import WAIT, kernel

import cudasim

PENDING = "pending asynchronous copy that was not waited for"

COPY = """
.reg .pred %%p; .reg .b64 %%a, %%d; .reg .b32 %%t, %%b, %%s, %%v, %%w, %%x, %%y;
.shared .align 16 .b8 buf[4096]; .shared .align 8 .b64 bar;
mov.u32 %%t, %%tid.x; mov.u32 %%b, bar; mov.u32 %%s, buf; mad.lo.u32 %%s, %%t, 16, %%s;
ld.param.u64 %%a, [in]; mad.wide.u32 %%a, %%t, 16, %%a;
cp.async.cg.shared.global [%%s], [%%a], 16; cp.async.commit_group;
cp.async.cg.shared.global [%%s+2048], [%%a+512], 16; cp.async.commit_group;
%s
ld.param.u64 %%d, [out]; mad.wide.u32 %%d, %%t, 4, %%d; st.global.u32 [%%d], %%v;
"""


def run(body, seed=0):
    cudasim.set_seed(seed)
    cudasim.reset_races()
    i, o = Buffer(np.arange(256, dtype=np.uint32)), Buffer(np.zeros(64, np.uint32))
    cudasim.Module(kernel(["in", "out"], body)).function("k").launch(1, 32, [i.ptr, o.ptr])
    return o.get()[:32], cudasim.race_count()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "wait, access, bad",
    [
        ("", "ld.shared.u32 %v, [%s];", True),
        ("cp.async.wait_group 1;", "ld.shared.u32 %v, [%s];", False),
        ("cp.async.wait_group 2;", "ld.shared.u32 %v, [%s];", True),
        ("cp.async.wait_group 1;", "ld.shared.u32 %v, [%s+2048];", True),
        ("cp.async.wait_group 0;", "ld.shared.u32 %v, [%s+2048];", False),
        ("cp.async.wait_all;", "ld.volatile.shared.u32 %v, [%s+2048];", False),
        ("", "ld.volatile.shared.u32 %v, [%s];", True),
        ("", "st.shared.u32 [%s], %t; mov.u32 %v, %t;", True),
        ("", "atom.shared.add.u32 %v, [%s], 1;", True),
        ("", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%v, %w, %x, %y}, [%s];", True),
        ("cp.async.wait_group 1;", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%v, %w, %x, %y}, [%s];", False),
        ("", "cp.async.cg.shared.global [%s], [%a+32], 16; mov.u32 %v, 0;", True),
        ("", "cp.async.cg.shared.global [%s], [%a], 16; mov.u32 %v, 0;", False),  # the same bytes again
        ("cp.async.wait_all;", "cp.async.cg.shared.global [%s], [%a+32], 16; cp.async.wait_all; mov.u32 %v, 0;", False),
    ],
)
def test_cp_async(wait, access, bad, seed, capfd):
    _, races = run(COPY % (wait + access), seed)
    assert races == (1 if bad else 0)
    if bad:
        assert PENDING in cudasim.last_report() and "cp.async.cg" in cudasim.last_report()
        assert access.split()[0] in cudasim.last_report()
        assert PENDING in capfd.readouterr().err


BULK = """
.reg .pred %%p; .reg .b64 %%a, %%d; .reg .b32 %%t, %%b, %%s, %%v;
.shared .align 16 .b8 buf[1024]; .shared .align 8 .b64 bar;
mov.u32 %%t, %%tid.x; mov.u32 %%b, bar; mov.u32 %%s, buf; setp.eq.u32 %%p, %%t, 0;
@%%p mbarrier.init.shared::cta.b64 [%%b], 1; bar.warp.sync -1;
ld.param.u64 %%a, [in];
@%%p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%%b], 128;
@%%p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%%s], [%%a], 128, [%%b];
bar.warp.sync -1; mad.lo.u32 %%s, %%t, 4, %%s;
%s ld.shared.u32 %%v, [%%s]; %s
ld.param.u64 %%d, [out]; mad.wide.u32 %%d, %%t, 4, %%d; st.global.u32 [%%d], %%v;
"""


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_bulk_copy(seed):
    wait = (WAIT % (5, 0, 5)).replace("%%", "%")
    got, races = run(BULK % (wait, ""), seed)
    assert races == 0 and got.tolist() == list(range(32))
    assert run(BULK % ("", wait), seed)[1] >= 1
    assert "cp.async.bulk" in cudasim.last_report() and "ld.shared" in cudasim.last_report()


def test_copy_nobody_waits_for_lands_at_the_end():
    """Another warp's plain write, made after the copy was issued, races with it."""
    body = (
        COPY
        % """mov.u32 %v, 0; xor.b32 %w, %t, 32; mov.u32 %s, buf; mad.lo.u32 %s, %w, 16, %s;
bar.sync 0; setp.lt.u32 %p, %t, 32; @%p st.shared.u32 [%s], %t;"""
    )
    i, o = Buffer(np.arange(1024, dtype=np.uint32)), Buffer(np.zeros(64, np.uint32))
    cudasim.Module(kernel(["in", "out"], body)).function("k").launch(1, 64, [i.ptr, o.ptr])
    assert cudasim.race_count() >= 1


def test_pending_copies_can_fail_the_launch():
    cudasim.set_race_mode(2)
    with pytest.raises(cudasim.CudaSimError, match=PENDING):
        run(COPY % "ld.shared.u32 %v, [%s];")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ring_buffer_is_clean(seed):
    so = compile_cuda("faults.cu")
    cudasim.set_seed(seed)
    a = np.random.default_rng(3).standard_normal((9, 64, 4)).astype(np.float32)
    o = Buffer(np.zeros_like(a))
    assert so.f_pipeline(Buffer(a), o, 9, 1) == 0 and cudasim.race_count() == 0
    assert so.f_pipeline(Buffer(a), o, 9, 2) == 0 and cudasim.race_count() >= 1


def test_many_reports_are_counted_only(capfd):
    _, races = run(COPY % ("ld.shared.u32 %v, [%s];\n" * 30))
    err = capfd.readouterr().err
    assert races == 30 and err.count(PENDING) == 20 and err.count("further reports") == 1


def test_expect_clean():
    with cudasim.expect_clean():
        run(COPY % "cp.async.wait_all; ld.shared.u32 %v, [%s];")
    with pytest.raises(cudasim.CudaSimError, match=PENDING), cudasim.expect_clean():
        run(COPY % "ld.shared.u32 %v, [%s];")
    fill = COPY % "cp.async.wait_all; ld.shared.u32 %v, [%s];"
    never = fill.replace("ld.shared.u32 %v, [%s]", "ld.shared.u32 %v, [%b]").replace("cp.async.wait_all;", "")
    with cudasim.expect_clean():
        run(never)
    with pytest.raises(cudasim.CudaSimError, match="never written"), cudasim.expect_clean(uninit=True):
        run(never)
    with cudasim.expect_clean():  # the setting is back
        run(never)
    cudasim.set_race_mode(0)
    with pytest.raises(ValueError), cudasim.expect_clean():
        pass
