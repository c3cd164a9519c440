"""Asynchronous and cluster instructions as bare PTX."""

import numpy as np
import pytest
from conftest import Buffer

import cudasim

HEAD = ".version 8.6\n.target sm_90a\n.address_size 64\n"


def kernel(params, body):
    return HEAD + ".visible .entry k(%s) {\n%s\nret; }" % (", ".join(".param .u64 %s" % p for p in params), body)


WAIT = "W%d: mbarrier.try_wait.parity.shared::cta.b64 %%p, [%%b], %d; @!%%p bra W%d;"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("noinc", ["", ".noinc"])
def test_cp_async_on_mbarrier(seed, noinc):
    cudasim.set_seed(seed)
    count = 64
    body = """
.reg .pred %%p; .reg .b64 %%a, %%d; .reg .b32 %%t, %%b, %%s, %%v, %%o;
.shared .align 16 .b8 buf[1024]; .shared .align 8 .b64 bar;
mov.u32 %%t, %%tid.x; mov.u32 %%b, bar; mov.u32 %%s, buf; mad.lo.u32 %%s, %%t, 16, %%s;
setp.eq.u32 %%p, %%t, 0; @%%p mbarrier.init.shared::cta.b64 [%%b], %d;
bar.sync 0;
ld.param.u64 %%a, [in]; mad.wide.u32 %%a, %%t, 16, %%a;
cp.async.cg.shared.global [%%s], [%%a], 16;
cp.async.mbarrier.arrive%s.shared::cta.b64 [%%b];
%s
%s
xor.b32 %%o, %%t, 33; mov.u32 %%s, buf; mad.lo.u32 %%s, %%o, 16, %%s; ld.shared.u32 %%v, [%%s];
ld.param.u64 %%d, [out]; mad.wide.u32 %%d, %%t, 4, %%d; st.global.u32 [%%d], %%v;
""" % (count, noinc, "" if noinc else ".reg .b64 %st; mbarrier.arrive.shared::cta.b64 %st, [%b];", WAIT % (0, 0, 0))
    src = np.arange(256, dtype=np.uint32)
    i, o = Buffer(src), Buffer(np.zeros(64, np.uint32))
    cudasim.Module(kernel(["in", "out"], body)).function("k").launch(1, 64, [i.ptr, o.ptr])
    assert o.get().tolist() == [4 * (t ^ 33) for t in range(64)]
    assert cudasim.race_count() == 0


def test_st_async_red_async_between_cluster_blocks():
    body = (
        """
.reg .pred %p; .reg .b64 %d; .reg .b32 %t, %b, %s, %v, %r, %rs, %rb, %sum;
.shared .align 16 .b8 buf[128]; .shared .align 8 .b64 bar; .shared .align 4 .u32 total;
mov.u32 %t, %tid.x; mov.u32 %b, bar; mov.u32 %r, %cluster_ctarank; mov.u32 %sum, total;
setp.eq.u32 %p, %t, 0;
@%p mbarrier.init.shared::cta.b64 [%b], 1;
@%p st.shared.u32 [%sum], 100;
@%p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], 256;
barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
mov.u32 %s, buf; mad.lo.u32 %s, %t, 4, %s; xor.b32 %r, %r, 1;
mapa.shared::cluster.u32 %rs, %s, %r; mapa.shared::cluster.u32 %rb, %b, %r; mapa.shared::cluster.u32 %sum, %sum, %r;
mov.u32 %v, %ctaid.x; mad.lo.u32 %v, %v, 1000, %t;
st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%rs], %v, [%rb];
red.async.relaxed.cluster.global.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%sum], %t, [%rb];
""".replace(".relaxed.cluster.global.", ".relaxed.cluster.")
        + (WAIT % (1, 0, 1)).replace("%%", "%")
        + """
ld.shared.u32 %v, [%s]; mov.u32 %sum, total; ld.shared.u32 %rs, [%sum]; add.u32 %v, %v, %rs;
mov.u32 %r, %ctaid.x; mad.lo.u32 %r, %r, 32, %t;
ld.param.u64 %d, [out]; mad.wide.u32 %d, %r, 4, %d; st.global.u32 [%d], %v;
barrier.cluster.arrive; barrier.cluster.wait;
"""
    )
    o = Buffer(np.zeros((2, 32), np.uint32))
    cudasim.Module(kernel(["out"], body)).function("k").launch(2, 32, [o.ptr], cluster=2)
    assert o.get().tolist() == [[1000 * (b ^ 1) + t + 100 + 496 for t in range(32)] for b in range(2)]


def test_vector_and_half_reductions():
    body = """
.reg .b64 %a; .reg .b32 %t, %u; .reg .f32 %f<4>; .reg .b32 %h;
mov.u32 %t, %tid.x; ld.param.u64 %a, [f]; cvt.rn.f32.u32 %f0, %t; add.f32 %f1, %f0, 0f3F800000; mov.f32 %f2, 0f40000000; mov.f32 %f3, 0f00000000;
red.global.add.v4.f32 [%a], {%f0, %f1, %f2, %f3};
ld.param.u64 %a, [h]; mov.b32 %h, 0x40003C00; red.global.add.noftz.f16x2 [%a], %h;
atom.global.max.noftz.bf16x2 %h, [%a+4], 0x3F804000;
ld.param.u64 %a, [q]; atom.global.cas.b64 %a, [%a], 5, 77;
"""
    f, h, q = Buffer(np.zeros(4, np.float32)), Buffer(np.zeros(4, np.uint16)), Buffer(np.array([5], np.uint64))
    cudasim.Module(kernel(["f", "h", "q"], body)).function("k").launch(1, 32, [f.ptr, h.ptr, q.ptr])
    assert f.get().tolist() == [496, 528, 64, 0]
    assert h.get()[:2].view(np.float16).tolist() == [32, 64] and h.get()[2:].tolist() == [0x4000, 0x3F80]
    assert q.get()[0] == 77


def test_pending_wgmma_register_is_reported(capfd):
    regs = ", ".join("%%f%d" % i for i in range(4))
    body = """
.reg .b64 %%d, %%o; .reg .b32 %%s, %%t; .reg .f32 %%f<4>, %%g; .reg .pred %%p;
.shared .align 1024 .b8 buf[4096];
mov.u32 %%t, %%tid.x; mov.u32 %%s, buf; mad.lo.u32 %%t, %%t, 32, %%s;
st.shared.v4.u32 [%%t], {0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80}; st.shared.v4.u32 [%%t+16], {0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80};
fence.proxy.async.shared::cta; bar.sync 0;
shr.u32 %%s, %%s, 4; cvt.u64.u32 %%d, %%s; or.b64 %%d, %%d, 0x0000001000080000;
setp.ne.u32 %%p, 0, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%s}, %%d, %%d, %%p, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
%s
ld.param.u64 %%o, [out]; mov.u32 %%t, %%tid.x; mad.wide.u32 %%o, %%t, 4, %%o; st.global.f32 [%%o], %%f0;
"""
    for wait, races in (("wgmma.wait_group.sync.aligned 0;", 0), ("", 1)):
        cudasim.reset_races()
        o = Buffer(np.zeros(128, np.float32))
        cudasim.Module(kernel(["out"], body % (regs, wait))).function("k").launch(1, 128, [o.ptr])
        assert (o.get() == 16).all()
        assert cudasim.race_count() == races
    assert "before wgmma.wait_group" in capfd.readouterr().err


@pytest.mark.parametrize(
    "before, after, report",
    [
        ("wgmma.fence.sync.aligned;", "", None),
        ("", "", "without a wgmma.fence before it"),
        (
            "wgmma.fence.sync.aligned;",
            "add.f32 %f1, %f0, %f0; add.f32 %f2, %f0, %f0;",
            "register written since the last wgmma.fence",
        ),
        ("wgmma.fence.sync.aligned;", "add.f32 %f1, %f0, %f0; wgmma.fence.sync.aligned;", None),
        ("wgmma.fence.sync.aligned;", "mov.f32 %f1, %f0;", None),  # compilers do this
        ("wgmma.fence.sync.aligned;", "mov.f32 %g, %f0;", None),
    ],
)
def test_missing_wgmma_fence(before, after, report, capfd):
    wgmma = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d, %d, %p, 1, 1, 0, 0;\n"
    wgmma += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    body = (
        """.reg .b64 %d, %o; .reg .b32 %s, %t; .reg .f32 %f<4>, %g; .reg .pred %p;
.shared .align 1024 .b8 buf[4096];
mov.u32 %t, %tid.x; mov.u32 %s, buf; mad.lo.u32 %t, %t, 32, %s;
st.shared.v4.u32 [%t], {0, 0, 0, 0}; st.shared.v4.u32 [%t+16], {0, 0, 0, 0};
mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
fence.proxy.async.shared::cta; bar.sync 0;
shr.u32 %s, %s, 4; cvt.u64.u32 %d, %s; or.b64 %d, %d, 0x0000001000080000; setp.eq.u32 %p, 0, 0;
"""
        + before
        + "\n"
        + wgmma
        + after
        + "\n"
        + wgmma
    )
    cudasim.Module(kernel([], body)).function("k").launch(1, 128, [])
    assert (cudasim.race_count() > 0) == (report is not None)
    if before:
        assert cudasim.race_count() <= 1
        assert ("cudasim: note: wgmma.mma_async uses" in capfd.readouterr().err) == (after == "mov.f32 %f1, %f0;")
    if report == "without a wgmma.fence before it":
        cudasim.set_race_mode(2)
        with pytest.raises(cudasim.CudaSimError, match=report):
            cudasim.Module(kernel([], body)).function("k").launch(1, 128, [])
    elif report:
        assert report in cudasim.last_report() and "add.f32 %f1, %f0, %f0" in cudasim.last_report()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "wait, reports",
    [("cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;", 0), ("cp.async.bulk.commit_group;", 1), ("", 1)],
)
def test_bulk_store_not_waited_for(wait, reports, seed):
    cudasim.set_seed(seed)
    body = (
        """.reg .b64 %d; .reg .b32 %s, %t; .reg .pred %p; .shared .align 16 .b8 buf[128];
mov.u32 %t, %tid.x; mov.u32 %s, buf; mad.lo.u32 %s, %t, 4, %s; st.shared.u32 [%s], %t;
fence.proxy.async.shared::cta; bar.warp.sync -1; setp.ne.u32 %p, %t, 0; @%p exit; ld.param.u64 %d, [out];
cp.async.bulk.global.shared::cta.bulk_group [%d], [%s], 128;
"""
        + wait
    )
    o = Buffer(np.zeros(32, np.uint32))
    cudasim.Module(kernel(["out"], body)).function("k").launch(1, 32, [o.ptr])
    assert o.get().tolist() == list(range(32))
    assert cudasim.race_count() == reports


def test_short_pointers():
    """-nvptx-short-ptr: const and param addresses pass through 32-bit registers."""
    text = (
        HEAD
        + """.const .align 4 .b32 pad = 1; .const .align 4 .b32 c[4] = {10, 20, 30, 40};
.visible .entry k(.param .u64 out, .param .align 64 .b8 blob[128]) {
.reg .b64 %a, %g; .reg .b32 %r, %v, %w, %x;
mov.b32 %r, c; ld.const.u32 %v, [%r+8];
mov.b32 %r, blob; ld.param.u32 %w, [%r+4]; cvt.u64.u32 %g, %r; cvta.param.u64 %g, %g; ld.u32 %x, [%g+8];
ld.param.u64 %a, [out]; st.global.u32 [%a], %v; st.global.u32 [%a+4], %w; st.global.u32 [%a+8], %x;
and.b64 %g, %g, 63; st.global.u64 [%a+16], %g;
mov.u64 %g, c; cvta.const.u64 %g, %g; ld.u32 %x, [%g+12]; st.global.u32 [%a+12], %x;
ret; }"""
    )
    o = Buffer(np.zeros(8, np.uint32))
    blob = np.arange(32, dtype=np.uint32).tobytes()
    cudasim.Module(text).function("k").launch(1, 1, [o.ptr, blob])
    assert o.get()[:6].tolist() == [30, 1, 2, 40, 0, 0]


def test_tensor_map_made_on_the_device():
    rep = "tensormap.replace.tile.%s.shared::cta.b1024.%s [%%m], %s;\n"
    fields = [
        ("global_address", "b64", "%src"),
        ("rank", "b32", "1"),
        ("box_dim", "b32", "0, 8"),
        ("box_dim", "b32", "1, 4"),
        ("global_dim", "b32", "0, 12"),
        ("global_dim", "b32", "1, 6"),
        ("global_stride", "b64", "0, 48"),
        ("element_stride", "b32", "0, 1"),
        ("element_stride", "b32", "1, 1"),
        ("elemtype", "b32", "0x7"),
        ("interleave_layout", "b32", "0x0"),
        ("swizzle_mode", "b32", "0x0"),
        ("fill_mode", "b32", "0x0"),
    ]
    body = (
        """
.reg .b64 %m, %src, %g, %d; .reg .b32 %t, %b, %s, %v; .reg .pred %p;
.shared .align 128 .b8 map[128]; .shared .align 128 .b8 buf[128]; .shared .align 8 .b64 bar;
mov.u32 %t, %tid.x; mov.u32 %s, map; mad.lo.u32 %v, %t, 4, %s; st.shared.u32 [%v], 0; cvt.u64.u32 %m, %s; mov.u32 %b, bar;
ld.param.u64 %src, [in]; ld.param.u64 %g, [map_out]; setp.eq.u32 %p, %t, 0; bar.warp.sync -1;
@!%p bra SKIP;
"""
        + "".join(rep % f for f in fields)
        + """
mbarrier.init.shared::cta.b64 [%b], 1;
SKIP: bar.warp.sync -1;
tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%g], [%s], 128;
fence.proxy.tensormap::generic.acquire.gpu [%g], 128;
mov.u32 %s, buf;
@%p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], 128;
@%p cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%s], [%g, {8, 3}], [%b];
"""
        + (WAIT % (2, 0, 2)).replace("%%", "%")
        + """
mad.lo.u32 %s, %t, 4, %s; ld.shared.u32 %v, [%s]; ld.param.u64 %d, [out]; mad.wide.u32 %d, %t, 4, %d; st.global.u32 [%d], %v;
"""
    )
    src = np.arange(1, 73, dtype=np.float32).reshape(6, 12)
    i, o, g = Buffer(src), Buffer(np.zeros((4, 8), np.float32)), Buffer(np.zeros(128, np.uint8))
    cudasim.Module(kernel(["in", "out", "map_out"], body)).function("k").launch(1, 32, [i.ptr, o.ptr, g.ptr])
    want = np.zeros((4, 8), np.float32)
    want[:3, :4] = src[3:, 8:]
    assert (o.get() == want).all()
    assert cudasim.race_count() == 0
