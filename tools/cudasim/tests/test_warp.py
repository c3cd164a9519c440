"""Lanes of one warp: exchange through shared memory, collectives of parts of a warp."""

import numpy as np
import pytest
from conftest import Buffer
from test_ptx_async import kernel

import cudasim

EXCHANGE = """
.reg .b64 %%d; .reg .b32 %%t, %%s, %%v, %%w, %%x, %%y, %%z; .reg .pred %%p;
.shared .align 16 .b8 buf[1024];
mov.u32 %%t, %%tid.x; mov.u32 %%s, buf; mad.lo.u32 %%s, %%t, 4, %%s; mov.u32 %%v, 0;
%s
ld.param.u64 %%d, [out]; mad.wide.u32 %%d, %%t, 4, %%d; st.global.u32 [%%d], %%v;
"""
FLIP = "sub.u32 %w, 31, %t; mov.u32 %x, buf; mad.lo.u32 %x, %w, 4, %x; "


@pytest.fixture
def race_warp():
    cudasim.set_race_warp(True)
    yield
    cudasim.set_race_warp(False)


@pytest.mark.parametrize(
    "body, races",
    [
        ("st.shared.u32 [%s], %t; {flip} ld.shared.u32 %v, [%x];", 1),
        ("st.shared.u32 [%s], %t; {flip} bar.warp.sync -1; ld.shared.u32 %v, [%x];", 0),
        ("st.shared.u32 [%s], %t; {flip} bar.sync 0; ld.shared.u32 %v, [%x];", 0),
        ("st.shared.u32 [%s], %t; {flip} shfl.sync.idx.b32 %y, %t, 0, 31, -1; ld.shared.u32 %v, [%x];", 0),
        ("st.shared.u32 [%s], %t; {flip} vote.sync.ballot.b32 %y, 1, -1; ld.shared.u32 %v, [%x];", 0),
        ("st.shared.u32 [%s], %t; ld.shared.u32 %v, [%s];", 0),
        # the lanes of a pair meet, or not the right ones
        (
            "st.shared.u32 [%s], %t; {flip} bar.warp.sync 0x80000001; bar.warp.sync 0x7ffffffe; ld.shared.u32 %v, [%x];",
            None,
        ),
        # a second round overwrites what other lanes still read
        (
            "st.shared.u32 [%s], %t; {flip} bar.warp.sync -1; ld.shared.u32 %v, [%x]; add.u32 %y, %t, 1; st.shared.u32 [%s], %y;",
            1,
        ),
        (
            "st.shared.u32 [%s], %t; {flip} bar.warp.sync -1; ld.shared.u32 %v, [%x]; add.u32 %y, %t, 1; bar.warp.sync -1; st.shared.u32 [%s], %y;",
            0,
        ),
        # bytes of one word
        ("mov.u32 %x, buf; add.u32 %x, %x, %t; st.shared.u8 [%x], %t; ld.shared.u8 %v, [%x];", 0),
        ("{flip} add.u32 %y, %t, 40; st.shared.u32 [%s], %y; st.shared.u32 [%x], %t;", 1),
        # collectives of the tensor cores
        (
            "mad.lo.u32 %x, %t, 12, %s; st.shared.u32 [%s], %t; st.shared.u32 [%s+128], %t; st.shared.u32 [%s+256], %t; st.shared.u32 [%s+384], %t;"
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%w, %x, %y, %z}, [%x];",
            0,
        ),
    ],
)
def test_exchange_within_a_warp(race_warp, body, races, capfd):
    if races is None:
        body = body.replace(
            "bar.warp.sync 0x80000001; bar.warp.sync 0x7ffffffe;",
            "setp.eq.u32 %p, %t, 0; setp.ne.u32 %p, %t, 31; bar.warp.sync -1;",
        )
        races = 0
    text = kernel(["out"], EXCHANGE % body.replace("{flip}", FLIP).replace("; ", ";\n"))
    o = Buffer(np.zeros(32, np.uint32))
    cudasim.Module(text).function("k").launch(1, 32, [o.ptr])
    assert cudasim.race_count() == races
    if races:
        assert "of a warp without a .sync instruction" in cudasim.last_report()
        assert "st.shared" in cudasim.last_report()


def test_tiles_synchronise_only_their_lanes(race_warp):
    """Lanes exchange within tiles of 8 (right) or across them (wrong); each tile passes its own mask."""
    body = """shr.u32 %y, %t, 3; shl.b32 %y, %y, 3; mov.u32 %z, 255; shl.b32 %z, %z, %y;
st.shared.u32 [%s], %t;
bar.warp.sync %z;
xor.b32 %w, %t, FLIP; mov.u32 %x, buf; mad.lo.u32 %x, %w, 4, %x;
ld.shared.u32 %v, [%x];"""
    for flip, races in ((7, 0), (8, 1)):
        cudasim.reset_races()
        o = Buffer(np.zeros(32, np.uint32))
        cudasim.Module(kernel(["out"], EXCHANGE % body.replace("FLIP", str(flip)))).function("k").launch(1, 32, [o.ptr])
        assert o.get().tolist() == [t ^ flip for t in range(32)]
        assert cudasim.race_count() == races


def test_lane_races_are_not_looked_for_by_default():
    o = Buffer(np.zeros(32, np.uint32))
    body = "st.shared.u32 [%s], %t; " + FLIP + "ld.shared.u32 %v, [%x];"
    cudasim.Module(kernel(["out"], EXCHANGE % body)).function("k").launch(1, 32, [o.ptr])
    assert cudasim.race_count() == 0 and o.get().tolist() == list(range(31, -1, -1))


@pytest.mark.parametrize("slice_", [192, 1])
@pytest.mark.parametrize("split", [0, 1, 2])
def test_member_mask_per_tile(split, slice_):
    """Tiles of 8 lanes execute one collective with a mask each, together or after diverging."""
    detour = [
        "",
        "setp.lt.u32 %p, %t, 12; @%p bra A; add.u32 %x, %t, 0; A:\n",
        "and.b32 %x, %t, 1; setp.eq.u32 %p, %x, 0; @%p bra B;\nadd.u32 %w, %w, 1; bra C;\nB: mov.u32 %w, 5;\nC:\n",
    ][split]
    body = (
        """shr.u32 %y, %t, 3; shl.b32 %y, %y, 3; mov.u32 %z, 255; shl.b32 %z, %z, %y;
"""
        + detour
        + """
shfl.sync.bfly.b32 %v, %t, 1, 0x181f, %z;
redux.sync.add.u32 %x, %t, %z;
setp.eq.u32 %p, %t, 11;
vote.sync.any.pred %p, %p, %z;
match.any.sync.b32 %w, %y, %z;
popc.b32 %w, %w;
mad.lo.u32 %v, %x, 100, %v;
mad.lo.u32 %v, %w, 1000000, %v;
@%p add.u32 %v, %v, 500000;
"""
    )
    cudasim.set_slice(slice_)
    o = Buffer(np.zeros(32, np.uint32))
    cudasim.Module(kernel(["out"], EXCHANGE % body)).function("k").launch(1, 32, [o.ptr])
    cudasim.set_slice(192)
    sums = [sum(range(t // 8 * 8, t // 8 * 8 + 8)) for t in range(32)]
    assert o.get().tolist() == [(t ^ 1) + 100 * sums[t] + 8000000 + (500000 if t // 8 == 1 else 0) for t in range(32)]


def test_lane_missing_from_its_own_mask():
    body = "setp.lt.u32 %p, %t, 16; selp.b32 %z, 0xffff, 0xffff, %p; bar.warp.sync %z;"
    o = Buffer(np.zeros(32, np.uint32))
    with pytest.raises(cudasim.CudaSimError, match="lanes ffff0000 execute .* member mask 0000ffff does not name them"):
        cudasim.Module(kernel(["out"], EXCHANGE % body)).function("k").launch(1, 32, [o.ptr])


def test_directives_without_blanks_and_unreadable_functions():
    text = """.version 8.6
.target sm_90a
.address_size 64
.visible .entry bad(.param.u64 p) { .reg.b32 %r; {{ frobnicate %r, ]; } } ret; }
.func helper() { .reg .weird %r; ret; }
.visible .entry calls() { call.uni helper, (); ret; }
.visible .entry k(.param.u64 p) {
.reg.b32 %r,%s<2>; .reg.b64 %a; .shared.align 4.b8 buf[16]; .local.align 8.b8 loc[8];
mov.u32 %r, 7; mov.u32 %s0, buf; st.shared.u32 [%s0], %r; ld.shared.u32 %s1, [%s0]; st.local.u32 [loc], %s1; ld.local.u32 %r, [loc];
ld.param.u64 %a, [p]; st.global.u32 [%a], %r; ret; }
"""
    m = cudasim.Module(text)
    o = Buffer(np.zeros(1, np.uint32))
    m.function("k").launch(1, 1, [o.ptr])
    assert o.get()[0] == 7
    with pytest.raises(cudasim.CudaSimError, match="PTX line 4"):
        m.function("bad")
    with pytest.raises(cudasim.CudaSimError, match="PTX line 5"):
        m.function("calls")
    with pytest.raises(cudasim.CudaSimError):
        cudasim.Module(text + ".visible .entry open() { .reg.b32 %r; ")


def test_video_instructions():
    def run(op, a, b, c=0):
        o = Buffer(np.zeros(1, np.uint32))
        text = kernel(
            ["p"],
            ".reg .b32 %%a, %%b, %%c; .reg .b64 %%p; mov.u32 %%a, %d; mov.u32 %%b, %d; mov.u32 %%c, %d; %s %%a, %%a, %%b, %%c;"
            "ld.param.u64 %%p, [p]; st.global.u32 [%%p], %%a;" % (a, b, c, op),
        )
        cudasim.Module(text).function("k").launch(1, 1, [o.ptr])
        return int(o.get()[0])

    a, b = 0x01FF8010, 0x0302907F
    assert run("vabsdiff4.u32.u32.u32", a, b) == 0x02FD106F
    assert run("vabsdiff4.u32.u32.u32.add", a, b, 5) == 5 + 0x02 + 0xFD + 0x10 + 0x6F
    assert run("vadd4.u32.u32.u32.sat", a, b) == 0x04FFFF8F
    assert run("vsub4.u32.u32.u32", a, b) == 0xFEFDF091
    assert run("vmax4.s32.s32.s32", a, b) == 0x0302907F
    assert run("vmin2.u32.u32.u32", a, b) == 0x01FF8010
    assert run("vmax2.s32.s32.s32", a, b) == 0x0302907F
    assert run("vavrg4.u32.u32.u32", a, b) == 0x02818848
