"""docs/cuda_roofline.md from kernels, GPUs and ops."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from roofline import machines
from roofline.machines import GPUS, SHARED_BYTES, Gpu
from roofline.model import MEMORY, ONE_WARP, Kernel, resident_blocks, tile_cycles, total_seconds
from roofline.ops import LENGTHS, OPS, Op
from roofline.units import bound

Kernels = Mapping[str, Mapping[str, Kernel]]  # by GPU, then by call

SHOWN = ("issue", "tensor", "special functions", "fp32", "integer", "shared memory", "L2", ONE_WARP)

HEAD = """# A model of the CUDA kernels' main loops

Written by `make cuda-roofline`; do not edit. **A model, not a measurement**: no figure on this page was measured on a
GPU by us. It says what the kernels could reach if, in the steady state of their main loop, nothing but the busiest unit
were waited for, and which unit that is.

How a figure comes about:

1. A kernel is compiled for the GPU's architecture. Its main loop is the one with the tensor-core instructions (where
   there are none, with the most bytes loaded), found by control flow; of the ways once round it the model takes that of
   a whole tile, without masks. Instructions on it are counted by unit.
2. Shared-memory wavefronts (bank conflicts among them) and bytes read through the L2 cache are counted on the emulated
   device (`tools/cudasim`), at two sizes, so that what a tile costs and what a block's beginning and end cost fall
   apart. The latter are counted in PTX. Operands of wgmma are read from shared memory, too, and what copies bring is
   written there; whether the two overlap is not published, the model adds them.
3. Cycles per tile of each unit are its counts over its rate. *One warp's time* is what a warp takes for its turns, were
   it alone, from the waits that the compiler wrote into the machine code, shared by the warps that registers and shared
   memory let be resident. The longest of these bounds the tile.
4. An op's time at a length T is that of its tiles and of its blocks' beginnings and ends, dealt to the multiprocessors
   as wholes, or that of the bytes that memory must move, whichever is longer. Launches, clocks that power lowers,
   barriers between warps and waits for the first tile are left out: expect less than this.

Attention: causal, bf16, early exit off, 16384 tokens at T 4096 and one sequence at T 32768, 2048 features of all heads
together; head dim 1024 with K = V. Useful operations are those of the literature (4 D per causal score forward, 10 D
backward; our backward pass does 14 D). Experts: d 1024, F 2048, 32 experts, two per token, evenly used. Decoding: 64
caches of T keys, 16 heads, two query heads each. Router: 1024 features, 256 hidden, 32 experts.

## Ops, and what published kernels reach

TFLOP/s of useful operations and their share of the tensor cores' peak, or GB/s and their share of memory's, then what
bounds the longest kernel. Modelled, but for the last column, which is others' measurements.

"""
PUBLISHED = """
1. Dao, "FlashAttention-2" (arXiv 2307.08691): up to 73 % of an A100 forward, 63 % backward; H100 as its charts have it.
2. Shah et al., "FlashAttention-3" (arXiv 2407.08608), causal; backward not causal.
3. "FlashAttention-4", as its authors say.
4. deepseek-ai/FlashMLA, README.
5. "SonicMoE" (arXiv 2512.14080), chart: 32 experts, two per token, n 1024, d 1536, SwiGLU.

These are softmax attention and gated experts: other functions, of like shape.

## Goals for Hopper

On H100, of the peak of wgmma unless something else is named. That the model allows a goal does not mean that it is met.

"""
LOOPS = """
## Steady state of each main loop

Modelled cycles of a multiprocessor per tile: 64 x 64 scores, a product of 128 x 128 x 64, 64 keys of two query heads;
of the router 32 x 64 x 64. Registers per thread; resident warps of those that a multiprocessor can hold. *in PTX*: the
loop goes round others more than once, so that instructions are counted as PTX has them.

"""
RATES = """
## Rates

"""
SOURCES = """
Everywhere, per multiprocessor and clock: 4 warp instructions, 16 special functions, 64 integer results, 32 shuffled
values, 128 bytes of shared memory. Sources:

"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def machine_table() -> str:
    head = ["GPU", "multiprocessors", "clock of the peak, GHz", "tensor peak, TFLOP/s", "by mma.sync", "fp32 per clock"]
    head += ["L2 bytes per clock", "memory, GB/s"]
    rows = []
    for g in GPUS:
        mma = g.mma_per_clock * g.multiprocessors * g.clock / 1e12
        figures = (g.tensor_flops / 1e12, mma, g.fp32, g.l2_per_clock, g.memory_bytes / 1e9)
        rows.append([g.name, str(g.multiprocessors), f"{g.clock / 1e9:.2f}", *(f"{x:.0f}" for x in figures)])
    return table(head, rows)


def kernel_row(call: str, gpu: Gpu, kernel: Kernel) -> list[str]:
    found = tile_cycles(kernel, gpu)
    if call.startswith("decoding"):  # what it loads comes from memory
        found[MEMORY] = kernel.tile().global_bytes / gpu.memory_per_clock
    warps = resident_blocks(kernel, gpu) * kernel.threads // 32
    cells = [f"{found[unit]:.0f}" for unit in SHOWN] + ([f"{found[MEMORY]:.0f}"] if MEMORY in found else [""])
    name = f"{call}: `{kernel.name}`" + ("" if kernel.explained else ", in PTX")
    return [
        name,
        gpu.name,
        f"{kernel.registers}",
        f"{warps}/{gpu.architecture.warps}",
        *cells,
        f"**{bound(found)[1]}**",
    ]


def kernel_rows(kernels: Kernels) -> list[list[str]]:
    """GPUs that agree share a row."""
    rows: list[list[str]] = []
    for call in kernels[GPUS[0].name]:
        for gpu in GPUS:
            row = kernel_row(call, gpu, kernels[gpu.name][call])
            if rows and (rows[-1][0], rows[-1][2:]) == (row[0], row[2:]):
                rows[-1][1] += f", {gpu.name}"
            else:
                rows.append(row)
    return rows


def op_cell(op: Op, t: int, gpu: Gpu, kernels: Mapping[str, Kernel]) -> tuple[str, float]:
    """What the table says, and the share of the GPU's peak."""
    time, unit = total_seconds([(kernels[name], work) for name, work in op.works(t)], gpu)
    rate = op.useful(t) / time
    if op.unit == "GB/s":
        return f"{rate / 1e9:.0f} GB/s ({100 * rate / gpu.memory_bytes:.0f} %), {unit}", rate / gpu.memory_bytes
    return f"{rate / 1e12:.0f} ({100 * rate / gpu.tensor_flops:.0f} %), {unit}", rate / gpu.tensor_flops


def goals(kernels: Kernels) -> str:
    """What the Hopper kernels are to reach, on H100: shares of its peak that published kernels come near."""
    gpu = next(g for g in GPUS if g.name == "H100")
    ops = {op.name: op for op in OPS}
    found = kernels[gpu.name]

    def share(name: str, kernels: Mapping[str, Kernel]) -> float:
        return op_cell(ops[name], LENGTHS[-1], gpu, kernels)[1]

    lines = []
    for name, goal, note in (
        ("products of expert_ffn, forward", 0.70, ""),
        ("products of expert_ffn, backward", 0.70, ""),
        ("stick_attention forward, D 128", 0.60, ""),
        ("stick_attention backward, D 128", 0.40, ""),
        ("stick_attention_decode, D 128", 0.85, " of the bandwidth"),
    ):
        reached = share(name, found)
        verdict = "the model allows it" if reached >= goal else "**the model does not allow it**"
        line = f"* {name}: at least {100 * goal:.0f} %{note} at T {LENGTHS[-1]}. "
        line += f"The model: {100 * reached:.0f} %; {verdict}."
        overlapping = share(name, {call: without_writes(kernel) for call, kernel in found.items()})
        if any(found[call].main.counts.wgmma_flops for call, _ in ops[name].works(LENGTHS[-1])):
            line += " If what copies write to shared memory cost nothing beside what wgmma reads: "
            line += f"{100 * overlapping:.0f} %."
        lines.append(line)
    cycles = tile_cycles(found["attention forward D 64"], gpu)
    over = bound(cycles)[0] / cycles["special functions"]
    verdict = "the model has it so" if over <= 1.15 else "**the model does not have it so**"
    lines.append(
        "* stick_attention forward, D 64: special functions bound it, at most 1.15 times their own time. The model: "
        f"{over:.2f} times, bounded by {bound(cycles)[1]}; {verdict}."
    )
    return "\n".join(lines) + "\n"


def without_writes(kernel: Kernel) -> Kernel:
    """As if copies into shared memory took no turns of it."""
    written = kernel.per_tile["loaded_bytes"] / SHARED_BYTES
    wavefronts = max(kernel.per_tile["wavefronts"] - written, 0)
    return replace(kernel, per_tile={**kernel.per_tile, "wavefronts": wavefronts})


def sources() -> str:
    listed = re.findall(r"^\[([\w ]+)\]\s+((?:.+\n)(?:\s{10,}.+\n)*)", machines.__doc__ or "", re.M)
    return "".join(f"* {name}: {' '.join(text.split())}\n" for name, text in listed)


def page(kernels: Kernels) -> str:
    reached = []
    for op in OPS:
        for t in LENGTHS:
            cells = [op_cell(op, t, gpu, kernels[gpu.name])[0] for gpu in GPUS]
            reached.append([op.name, str(t), *cells, op.published if t == LENGTHS[0] else ""])
    parts = [
        HEAD,
        table(["op", "T", *(f"{g.name}, modelled" for g in GPUS), "published"], reached),
        PUBLISHED,
        goals(kernels),
        LOOPS,
        table(["main loop", "GPU", "registers", "warps", *SHOWN, MEMORY, "bounded by"], kernel_rows(kernels)),
        RATES,
        machine_table(),
        SOURCES,
        sources(),
    ]
    return "".join(parts)
