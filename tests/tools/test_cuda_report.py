"""The parts of tools/cuda_report.py that need no compiler."""

import pytest


def test_usage_by_kernel(report):
    text = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'clean' for 'sm_80'
ptxas info    : Function properties for clean
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 12288 bytes smem, 1624 bytes cmem[0]
ptxas info    : Compiling entry function 'spills' for 'sm_80'
ptxas info    : Function properties for spills
    24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 352 bytes cmem[0]
"""
    assert report.parse_ptxas(text) == {
        "clean": report.Usage(registers=96, stack=0, spilled=0, shared_bytes=12288),
        "spills": report.Usage(registers=255, stack=24, spilled=36, shared_bytes=0),
    }


def test_spills_of_a_function_that_is_not_inlined_are_its_kernels(report):
    text = """ptxas info    : Compiling entry function 'calls' for 'sm_90'
ptxas info    : Function properties for calls
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for rows_again
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 352 bytes cmem[0]
"""
    assert report.parse_ptxas(text)["calls"] == report.Usage(registers=255, stack=16, spilled=12, shared_bytes=0)


def test_threads_of_launch_bounds(report):
    ptx = """.visible .entry bounded(
	.param .u64 bounded_param_0
)
.maxntid 128
.minnctapersm 5
{
}
.visible .entry unbounded(
	.param .u64 unbounded_param_0
)
{
}
"""
    assert report.parse_threads(ptx) == {"bounded": 128}


@pytest.mark.parametrize(
    ("registers", "threads", "shared_bytes", "warps"),
    [
        (32, 1024, 0, 64),  # full
        (96, 128, 0, 20),  # registers: 65536 / (96 * 128) = 5 blocks
        (33, 1024, 0, 32),  # 33 registers take the room of 40
        (32, 32, 0, 32),  # blocks
        (32, 128, 40 << 10, 16),  # shared memory: 164 / 41 = 4 blocks
    ],
)
def test_occupancy(report, registers, threads, shared_bytes, warps):
    assert report.ARCHITECTURES[0].resident_warps(registers, threads, shared_bytes) == warps


def test_sass_counts(report):
    text = """	.section	.text.kernel,"ax",@progbits
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
        /*0010*/                   LDG.E.128.CONSTANT R8, [R2.64+0x10] ;
        /*0020*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
        /*0030*/                   STG.E [R2.64], R0 ;
"""
    counts = report.parse_sass(text)["kernel"]
    assert (counts["all"], counts["LDG.128"], counts["MMA"], counts["STG.128"]) == (4, 2, 1, 0)


LOOP = """	.section	.text.kernel,"ax",@progbits
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
.L_x_0:
        /*0020*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
        /*0030*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
        /*0040*/              @P0  BRA `(.L_x_0) ;
        /*0050*/              @P1  BRA `(.L_x_1) ;
        /*0060*/                   STG.E [R2.64], R0 ;
"""


def test_main_loop_is_the_innermost_with_the_most_products(report):
    counts = report.parse_sass(LOOP)["kernel"]
    assert (counts["loop"], counts["loop MMA"]) == (3, 2)
    assert report.main_loop("no loop") == (0, 0)


def test_kernels_must_have_their_instructions(report):
    counts = {**dict.fromkeys(report.SASS_PATTERNS, 1), "LDL": 0, "STL": 0}
    name = "stick_fwd_bf16_d64_sm80"
    assert report.missing_instructions(name, counts) == []
    assert report.missing_instructions(name, {**counts, "MMA": 0, "STL": 2}) == ["no MMA", "2 STL"]
    unaligned = "grouped_forward_bf16_64x128_unaligned_sm80"
    assert report.missing_instructions(unaligned, {**counts, "LDGSTS": 0, "STG.128": 0}) == []
    assert report.missing_instructions("grouped_forward_bf16_64x128_sm80", {**counts, "LDGSTS": 0}) == ["no LDGSTS"]


def test_report_of_two_files(report, tmp_path):
    architectures = [architecture.name for architecture in report.ARCHITECTURES]
    (tmp_path / "x_cuda.cu").write_text("")

    def kernels(name, spilled):
        usage = {a: {name: report.Usage(registers=96, stack=0, spilled=spilled, shared_bytes=0)} for a in architectures}
        sizes = dict.fromkeys((*architectures, "PTX"), 3 << 20)
        return report.Kernels(tmp_path / "x_cuda.cu", {name: 128}, usage, {}, sizes)

    text = report.write_report([kernels("clean", 0), kernels("spills", 8)])
    assert "| `clean` | 128 | 0 | 96, 20/64 |" in text
    assert "**stack 0, spilled 8**" in text
    assert "All kernels together are 6.0 MiB of machine code for sm_80," in text
    assert "6.0 MiB of PTX, before compression." in text
