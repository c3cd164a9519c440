"""The model of tools/cuda_roofline.py: loops and paths of listings, unit counts by hand, arithmetic."""

import dataclasses
import re
from pathlib import Path

import pytest
from roofline import latency, model, sass, units
from roofline.emulated import Call, calls, costs, solve
from roofline.machine_code import at, copying_turn, loaded_bytes, main_turn
from roofline.machines import GPUS, SM
from roofline.model import Kernel, Turn, Work
from roofline.ops import LENGTHS, OPS
from roofline.page import HEAD, goals, page
from roofline.sass import Instruction
from roofline.units import Counts

A100, L40S, H100, H200, B200 = GPUS
DOCS = Path(__file__).parents[2] / "docs"


def listing(*lines, name="kernel"):
    """As `nvdisasm -hex` prints it; a line is an instruction, or a label."""
    text, address = f'\t.section\t.text.{name},"ax",@progbits\n', 0
    for line in lines:
        if line.startswith(".L"):
            text += f"{line}:\n"
            continue
        code, _, control = line.partition(" | ")
        fields = dict(field.split("=") for field in control.split())
        word = int(fields.get("stall", 1)) << 41 | int(fields.get("write", 7)) << 46 | int(fields.get("read", 7)) << 49
        word |= sum(1 << int(barrier) for barrier in fields.get("wait", "").split(",") if barrier) << 52
        text += f"        /*{address:04x}*/                   {code} ;   /* 0x0000000000000000 */\n"
        text += f"                                                      /* 0x{word:016x} */\n"
        address += 16
    return text


# A tile with a mask goes through .L_x_2, a whole one does not; the loop inside is a wait.
LOOP = listing(
    "MOV R1, c[0x0][0x28]",
    ".L_x_0",
    "LDSM.16.M88.4 R4, [R2] | write=0",
    "@!P1 BRA `(.L_x_1)",
    "LDGSTS.E.BYPASS.128 [R69], [R70.64]",
    ".L_x_1",
    "SYNCS.PHASECHK.TRANS64 P2, [R3], R5",
    "@!P2 BRA `(.L_x_1)",
    "HMMA.16816.F32.BF16 R0, R4, R8, RZ | wait=0",
    "HMMA.16816.F32.BF16 R0, R4, R8, R0",
    "@P0 BRA `(.L_x_2)",
    "FMUL R0, R0, c[0x0][0x278]",
    "MUFU.EX2 R0, R0 | write=1",
    "BRA `(.L_x_3)",
    ".L_x_2",
    "FMUL R0, R0, c[0x0][0x278]",
    "ISETP.GE.AND P3, PT, R9, R8, PT",
    "FSEL R0, R0, -INF, P3",
    "MUFU.EX2 R0, R0",
    ".L_x_3",
    "F2FP.BF16.PACK_AB R0, R0, R0 | wait=1",
    "SHFL.BFLY PT, R1, R0, 0x1, 0x1f",
    "@P1 BRA `(.L_x_0)",
    "STG.E [R2.64], R0",
    "EXIT",
)
HMMA_FLOPS = 2 * 16 * 8 * 16


def main(text, flops=0, loaded_bytes=0, special=0):
    """The turn of a main loop in a listing, of which the emulated device counted this for one warp's turn."""
    return main_turn(sass.parse(text)["kernel"], {"flops": flops, "loaded_bytes": loaded_bytes, "special": special})


@pytest.fixture(scope="module")
def loop():
    return main(LOOP, flops=2 * HMMA_FLOPS, loaded_bytes=512, special=1)


def test_units_of_a_turn_are_those_counted_by_hand(loop):
    # LDSM, BRA, LDGSTS, SYNCS, BRA, 2 HMMA, BRA, FMUL, MUFU, BRA, F2FP, SHFL, BRA: no mask, and with the copy.
    assert loop.counts == Counts(issued=14, hmma_flops=2 * HMMA_FLOPS, special=1, fp32=1, integer=1, shuffles=1)
    assert loop.flops == 2 * HMMA_FLOPS
    assert loop.loaded == 512  # 16 bytes by each lane


def test_the_way_loads_as_much_as_the_emulated_device():
    without = main(LOOP, flops=2 * HMMA_FLOPS, loaded_bytes=0, special=1)
    assert (without.loaded, without.counts.issued) == (0, 13)


def test_one_warps_time_follows_stalls_and_scoreboards(loop):
    # 13 cycles until the last instruction has issued, and two waits: from LDSM, issued at 0, to the first HMMA, which
    # would issue at 5; and from MUFU to F2FP, two further on.
    waits = (latency.LATENCY["LDSM"] - 5) + (latency.LATENCY["MUFU"] - 2)
    assert loop.cycles == 14 + waits


def test_main_loop_is_inside_the_loop_over_tiles():
    text = listing(
        ".L_x_0",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0",
        ".L_x_1",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0",
        "@P0 BRA `(.L_x_1)",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    )
    assert main(text, flops=2 * HMMA_FLOPS).flops == 2 * HMMA_FLOPS


def test_a_loop_without_tensor_instructions_is_the_one_that_loads_most():
    text = listing(
        ".L_x_0",
        "LDG.E R4, [R2.64]",
        "@P0 BRA `(.L_x_0)",
        ".L_x_1",
        "LDG.E.128.CONSTANT R4, [R2.64]",
        "FFMA R0, R4, R8, R0",
        "@P1 BRA `(.L_x_1)",
        "EXIT",
    )
    found = main(text, loaded_bytes=512)
    assert (found.counts.issued, found.counts.fp32, found.loaded) == (3, 1, 512)


def test_special_functions_that_some_warps_do_count_by_their_share():
    slow = Turn(Counts(issued=100, special=4), 1, 0, 50)
    fast = Turn(Counts(issued=40), 1, 0, 20)
    assert at({0: fast, 4: slow}, 1) == Turn(Counts(issued=55, special=1), 1, 0, 50)
    assert at({0: fast, 4: slow}, 4.1) == slow
    assert at({0: fast, 4: slow}, 0) == fast


def test_a_division_of_integers_has_no_special_function_in_ptx():
    text = listing(
        ".L_x_0",
        "I2F.RP R4, R5",
        "MUFU.RCP R4, R4",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
    )
    assert main(text, flops=HMMA_FLOPS).counts.special == 2  # the unit is busy, all the same


def test_what_no_way_leads_to_makes_no_loop():
    lines = [".L_x_0", "NOP", "EXIT", "HMMA.16816.F32.BF16 R0, R4, R8, R0", "BRA `(.L_x_0)"]
    assert sass.loops(sass.parse(listing(*lines))["kernel"]) == []


def test_a_call_may_lead_into_a_loop():
    text = listing(
        "@P0 CALL.REL.NOINC `(.L_x_0)",
        "EXIT",
        ".L_x_0",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    )
    assert main(text, flops=HMMA_FLOPS).flops == HMMA_FLOPS


def test_a_branch_into_a_loops_middle_makes_no_loop():
    code = sass.parse(listing("@P0 BRA `(.L_x_1)", ".L_x_0", "NOP", ".L_x_1", "NOP", "@P1 BRA `(.L_x_0)", "EXIT"))
    assert sass.loops(code["kernel"]) == []  # neither block dominates the other


def test_warps_that_only_copy_have_a_turn_of_their_own():
    lines = [
        "@P0 BRA `(.L_x_1)",
        "USETMAXREG.DEALLOC.CTAPOOL 0x48",
        ".L_x_0",
        "LDGSTS.E.BYPASS.128 [R69], [R70.64]",
        "UTMALDG.3D [UR8], [UR4]",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_1",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
        "@P1 BRA `(.L_x_1)",
        "EXIT",
    ]
    code = sass.parse(listing(*lines))["kernel"]
    assert copying_turn(code).counts.issued == 3
    again = [line.replace("_x_0", "_x_2") for line in lines[2:6]]  # a loop of as many bytes and instructions
    assert copying_turn(sass.parse(listing(*lines[:6], *again, *lines[6:]))["kernel"]).counts.issued == 3
    assert main(listing(*lines), flops=2 * 64 * 128 * 16 // 4).counts.issued == 2
    lines[3] = "NOP"  # all by bulk copies
    assert copying_turn(sass.parse(listing(*lines))["kernel"]).counts == Counts()
    lines[1] = "NOP"
    assert copying_turn(sass.parse(listing(*lines))["kernel"]) is None


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 // 4),
        ("HGMMA.64x64x16.F32", 2 * 64 * 64 * 16 // 4),
        ("FFMA", 0),
    ],
)
def test_flops_of_tensor_instructions(opcode, flops):
    assert units.tensor_flops(Instruction(opcode, "R0, R4, R8, R0")) == flops


def test_wgmma_reads_a_from_shared_memory_unless_it_is_in_registers():
    opcode = "HGMMA.64x128x16.F32.BF16"
    assert 4 * units.wgmma_bytes(Instruction(opcode, "R24, gdesc[UR8], R24")) == 2 * 16 * (64 + 128)
    assert 4 * units.wgmma_bytes(Instruction(opcode, "R24, R4, gdesc[UR8], R24")) == 2 * 16 * 128


@pytest.mark.parametrize(
    ("opcode", "loaded"),
    [
        ("LDG.E", 128),
        ("LDG.E.64", 256),
        ("LDG.E.128.CONSTANT", 512),
        ("LDG.E.U16", 0),
        ("LD.E.64", 256),
        ("LDS.128", 0),
    ],
)
def test_loaded_bytes(opcode, loaded):
    assert loaded_bytes(Instruction(opcode, "R4, [R2.64]")) == loaded


def test_each_unit_has_its_rate():
    counts = Counts(
        issued=400,
        hmma_flops=100 * 2048,
        special=50,
        fp32=200,
        integer=200,
        shuffles=100,
        wavefronts=100,
        global_bytes=100 * A100.l2_per_clock,
    )
    assert units.cycles(counts, A100) == pytest.approx(dict.fromkeys(units.cycles(counts, A100), 100))
    assert units.cycles(counts, H100)["fp32"] == 50
    assert units.cycles(Counts(wgmma_flops=4096), H100)["tensor"] == 1


@pytest.mark.parametrize(
    ("architecture", "registers", "threads", "shared_bytes", "warps"),
    [  # the occupancy calculator's
        ("sm_80", 168, 128, 24 << 10, 12),
        ("sm_80", 128, 256, 48 << 10, 16),
        ("sm_80", 255, 256, 0, 8),
        ("sm_89", 168, 128, 24 << 10, 12),
        ("sm_89", 40, 1024, 0, 32),
        ("sm_90", 168, 384, 202 << 10, 12),
        ("sm_90", 32, 128, 113 << 10, 8),
        ("sm_90", 32, 128, 114 << 10, 4),  # 1 KiB of each block belongs to the system
        ("sm_100", 64, 256, 0, 32),
    ],
)
def test_occupancy(architecture, registers, threads, shared_bytes, warps):
    assert SM[architecture].resident_warps(registers, threads, shared_bytes) == warps


NOTHING = dict.fromkeys(("issued", "special", "shuffles", "flops", "wavefronts", "global_bytes"), 0)
FIGURES = {"issued": 40, "special": 0, "shuffles": 0, "flops": 0, "wavefronts": 64, "global_bytes": 0}
TILE = FIGURES | {"issued": 56, "flops": 4 * 2 * HMMA_FLOPS, "cp_async_bytes": 0, "loaded_bytes": 2048}


def kernel(**changes):
    counts = Counts(issued=14, hmma_flops=2 * HMMA_FLOPS, special=1)
    values = {"main": Turn(counts, 2 * HMMA_FLOPS, 512, 100), "copying": None, "per_tile": TILE, "per_unit": FIGURES}
    return Kernel(
        **{"name": "k", "registers": 128, "threads": 128, "shared_bytes": 0, "blocks_per_unit": 1} | values | changes
    )


def test_a_tile_takes_as_many_turns_as_its_products():
    assert kernel().turns == 4
    assert kernel().tile() == Counts(issued=56, hmma_flops=8 * HMMA_FLOPS, special=4, wavefronts=64)
    found = model.tile_cycles(kernel(), A100)
    assert found["issue"] == 14 and found["tensor"] == 8 * HMMA_FLOPS / 2048 and found["shared memory"] == 64
    # 4 turns of 100 cycles by 16 resident warps
    assert found[model.ONE_WARP] == 25
    assert units.bound(found) == (64, "shared memory")


def test_a_kernel_without_products_turns_as_often_as_it_loads():
    main = Turn(Counts(issued=10), 0, 512, 100)
    assert kernel(main=main, per_tile=TILE | {"flops": 0, "loaded_bytes": 4096}).turns == 8


def test_ptx_counts_where_the_loop_does_not_account_for_a_tile():
    found = kernel(per_tile=TILE | {"issued": 112})
    assert not found.explained and kernel().explained
    assert found.tile() == Counts(issued=112, hmma_flops=8 * HMMA_FLOPS, wavefronts=64)
    assert found.warp_cycles == 2 * kernel().warp_cycles
    assert not kernel(per_tile=TILE | {"loaded_bytes": 4096}).explained
    assert kernel(per_tile=TILE | {"issued": 112}, copying=Turn(Counts(), 0, 1, 1)).explained


def test_copying_warps_issue_too_and_take_no_turns():
    copying = Turn(Counts(issued=20), 0, 2048, 50)
    found = kernel(threads=384, copying=copying, per_tile=TILE | {"cp_async_bytes": 8192})
    assert found.tile().issued == 56 + 4 * 20
    assert found.multiplying_warps == 8


def test_bounds_grow_with_counts_and_shrink_with_rates_and_warps():
    for field in dataclasses.fields(Counts):
        more = dataclasses.replace(kernel().tile(), **{field.name: getattr(kernel().tile(), field.name) + 1000})
        assert units.bound(units.cycles(more, A100))[0] >= units.bound(units.cycles(kernel().tile(), A100))[0]
    work = Work(units=1e4, tiles=1e6, memory_bytes=1e6)
    time = max(model.seconds(kernel(), work, A100).values())
    assert max(model.seconds(kernel(registers=255), work, A100).values()) >= time
    assert max(model.seconds(kernel(), dataclasses.replace(work, tiles=2e6), A100).values()) > time
    assert max(model.seconds(kernel(), dataclasses.replace(work, units=2e4), A100).values()) > time
    faster = dataclasses.replace(A100, multiprocessors=216, tensor_flops=2 * A100.tensor_flops, memory_bytes=4e12)
    assert max(model.seconds(kernel(), work, faster).values()) < time


def test_blocks_are_dealt_as_wholes():
    def shared(blocks):
        return model.seconds(kernel(per_unit=NOTHING), Work(blocks, 1e6, 0), A100)["shared memory"]

    full = 64 * 1e6 / A100.multiprocessors / A100.clock
    assert shared(2 * 108) == pytest.approx(full)
    assert shared(2 * 108 + 1) == pytest.approx(full * 3 * 108 / 217)
    assert shared(54) == pytest.approx(2 * full)
    launches = model.seconds(kernel(per_unit=NOTHING), Work(2 * 54, 1e6, 0, launches=2), A100)
    assert launches["shared memory"] == pytest.approx(2 * full)
    half = model.seconds(kernel(per_unit=NOTHING, blocks_per_unit=0.5), Work(2 * 54, 1e6, 0), A100)
    assert half["shared memory"] == pytest.approx(2 * full)


def test_few_blocks_have_few_warps():
    idle = kernel(per_unit=NOTHING)
    one = model.seconds(idle, Work(108, 1e6, 0), A100)[model.ONE_WARP]
    many = model.seconds(idle, Work(108 * 40, 1e6, 0), A100)[model.ONE_WARP]
    assert one == pytest.approx(4 * many)  # of four blocks that fit


def test_a_units_ends_cost_a_warp_as_much_per_instruction_as_the_loop():
    # 40 instructions at 100 / 14 cycles each by 16 warps
    assert model.unit_alone(kernel(), 4) == pytest.approx(40 * 100 / 14 / 16)
    found = model.seconds(kernel(), Work(108 * 40, 0, 0), A100)
    assert found[model.ONE_WARP] == pytest.approx(40 * model.unit_alone(kernel(), 4) / A100.clock)


def test_memory_bounds_where_bytes_take_longer():
    work = Work(1e4, 1, 2039e9)
    assert model.total_seconds([(kernel(), work)], A100) == (pytest.approx(1), model.MEMORY)
    both = model.total_seconds([(kernel(), work), (kernel(), Work(1e4, 1e3, 0))], A100)
    assert both[0] > 1 and both[1] == model.MEMORY


def test_two_sizes_tell_tiles_from_units():
    amounts = [(4, 16), (4, 32)]
    assert solve(amounts, [3 * 4 + 5 * 16, 3 * 4 + 5 * 32]) == pytest.approx((3, 5))


def test_costs_of_a_call_follow_from_its_launches():
    def launch(size):
        counted = {"global_load_sectors": 2 * size, "global_store_sectors": 8, "bulk_bytes": 256 * size}
        counted |= {"shared_wavefronts": 10 * size + 7, "cp_async_bytes": 0}
        counted |= {"warp_instructions": 100 * size + 40, "mma_flops": 4096 * size}
        shape = {"kernel": "k", "grid": [6, 1, 2], "block": [128, 1, 1], "dynamic_smem": 1000, "static_smem": 24}
        return counted | shape | {"issued": {"sfu": size, "shuffle": 0}}

    call = Call("k", (3, 5), lambda size: None, lambda size: (4, size))
    found = costs(call, [launch(size) for size in call.sizes])
    assert (found["kernel"], found["threads"], found["shared_bytes"], found["blocks_per_unit"]) == ("k", 128, 1024, 3)
    assert found["tile"]["issued"] == 100 and found["unit"]["issued"] == 10
    assert found["tile"]["wavefronts"] == 10 + 2  # and two of 128 bytes that a bulk copy writes
    assert found["tile"]["global_bytes"] == 64 + 256 and found["unit"]["global_bytes"] == 64


def test_peaks_follow_from_rates():
    for gpu in GPUS:
        assert gpu.clock * gpu.multiprocessors * gpu.tensor_per_clock == pytest.approx(gpu.tensor_flops)
        assert gpu.mma_per_clock <= gpu.tensor_per_clock
        assert 1.3e9 < gpu.clock < 2.6e9
    assert A100.clock == pytest.approx(1.41e9, rel=1e-3)  # what its data sheet says


def kernels():
    slow = kernel(per_tile=TILE | {"global_bytes": 512})
    return {gpu.name: dict.fromkeys(calls(), slow) for gpu in GPUS}


def test_ops_are_made_of_calls_and_work_grows_with_length():
    for op in OPS:
        short, long = (dict(op.works(t)) for t in LENGTHS)
        assert set(short) <= set(calls())
        for name, work in short.items():
            assert 0 < work.tiles < long[name].tiles and work.units > 0 and work.memory_bytes > 0, op.name
        assert op.useful(LENGTHS[0]) < op.useful(LENGTHS[1])


def test_page_names_every_gpu_and_op_and_calls_itself_a_model():
    text = page(kernels())
    assert "A model, not a measurement" in HEAD
    for op in OPS:
        assert text.count(f"| {op.name} |") == len(LENGTHS)
    for gpu in GPUS:
        assert f"{gpu.name}, modelled" in text
    rows = [line for line in text.splitlines() if line.endswith("** |")]  # what bounds is said in each
    assert sum(line.split(" | ")[1].count(",") + 1 for line in rows) == len(calls()) * len(GPUS)
    assert "SonicMoE" in text and "arXiv 2402.13499" in text  # sources
    assert text.count("the model allows it") + text.count("the model does not allow it") == 5  # goals


@pytest.mark.parametrize(
    ("loop", "by_hand"),
    [
        (  # 64 rows x 64 keys, D 64: two products; 1.25 special functions per score; two warps read K and V whole, and
            # copies write them once
            "attention forward D 64: `stick_fwd_bf16_d64_sm80`",
            {
                "tensor": 2 * 2 * 64**3 / 2048,
                "special functions": 1.25 * 64**2 / 16,
                "shared memory": (2 + 1) * 2 * 64 * 64 * 2 / 128,
                "L2": 2 * 64 * 64 * 2 / (5120 / 108),
            },
        ),
        (  # 128 x 128 x 64: each of 2 x 2 warps reads 64 rows and 64 columns, and copies write 128 of each
            "up product: `grouped_forward_bf16_128x128_sm80`",
            {
                "tensor": 2 * 128 * 128 * 64 / 2048,
                "special functions": 0,
                "shared memory": (4 * (64 + 64) + 128 + 128) * 64 * 2 / 128,
                "L2": (128 + 128) * 64 * 2 / (5120 / 108),
            },
        ),
    ],
)
def test_the_page_has_what_is_counted_by_hand_for_a100(loop, by_hand):
    lines = (DOCS / "cuda_roofline.md").read_text().splitlines()
    (head,) = (line.split(" | ") for line in lines if line.startswith("| main loop |"))
    (row,) = (line.split(" | ") for line in lines if line.startswith(f"| {loop} | A100 |"))
    assert {unit: row[head.index(unit)] for unit in by_hand} == {unit: f"{n:.0f}" for unit, n in by_hand.items()}


def test_hopper_is_modelled_with_its_own_kernels():
    """Where the sources have one of the same products or head dim."""
    lines = (DOCS / "cuda_roofline.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and "_sm" in line and "| H100, H200 |" in line]
    products, attention = (
        "(up|down|hidden|input|weight) ",
        "attention ((forward|query kernel|key kernel) D (64|128)|forward D 1024):",
    )
    own = [row for row in rows if re.match(rf"\| ({products}|{attention})", row)]
    assert len(own) == 12 and all("_sm90a`" in row for row in own)
    assert all("_sm80`" in row for row in rows if row not in own)


def test_goals_are_met_by_fast_kernels_alone():
    main = kernel().main
    slow = kernel(main=dataclasses.replace(main, cycles=1e6))
    little = TILE | {"issued": 14, "flops": 2 * HMMA_FLOPS, "loaded_bytes": 512, "wavefronts": 0, "special": 1}
    fast = kernel(per_unit=NOTHING, per_tile=little)
    for found, verdict in ((slow, "the model does not allow it"), (fast, "the model allows it")):
        text = goals({gpu.name: dict.fromkeys(calls(), found) for gpu in GPUS})
        assert text.count(verdict) == 5
