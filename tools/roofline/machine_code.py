"""Compiles kernels, and finds what a warp does in their main loops."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import cuda_report

from roofline import sass
from roofline.latency import cycles_per_turn
from roofline.machines import WARP
from roofline.model import Turn
from roofline.sass import Block, Instruction, element_bits
from roofline.units import TENSOR, Counts, count, tensor_flops

NEAR_SPECIAL = 0.1
"""Of special functions in a turn as counted on the emulated device: nearer is the same way through the loop."""


@dataclass(frozen=True)
class Compiled:
    registers: int
    main: Turn
    copying: Turn | None


def sources(kernel: str) -> list[Path]:
    """Files that may hold a kernel: those of its room, bf16 where types have files of their own."""
    room = "grouped_gemm" if kernel.startswith("grouped") else kernel.split("_")[0]
    found = [p for p in (cuda_report.ROOT / "csrc").glob("*/*_cuda.cu") if p.parent.name.startswith(room)]
    other_types = re.compile(r"_(f16|f32|tf32)_")
    on_sm90a = kernel.endswith("_sm90a")
    found = [p for p in found if not other_types.search(p.name) and cuda_report.on_sm90a_alone(p) == on_sm90a]
    return sorted(found, key=lambda p: ("bf16" not in p.name, p.name))


@cache
def ptx(source: Path) -> Path:
    """Compiled once, for the lowest architecture that has the kernels."""
    path = cuda_report.WORK / f"{source.stem}.ptx"
    hopper = cuda_report.on_sm90a_alone(source)
    architecture = ["-arch=compute_90a", f"-I{cuda_report.find_cutlass()}"] if hopper else ["-arch=compute_80"]
    cuda_report.run("nvcc", *cuda_report.FLAGS, *architecture, "-ptx", source, "-o", path)
    return path


@cache
def plain(name: str) -> str:
    """Of a mangled name, or of one that the emulated device reports."""
    return re.sub(r"\(.*", "", cuda_report.readable(name))


def compile_kernel(kernel: str, target: str, per_tile: Mapping[str, float]) -> Compiled:
    """For ptxas's `target`; a kernel of Hopper's own instructions is compiled for that. `per_tile`: what the emulated
    device counted."""
    target = "sm_90a" if kernel.endswith("_sm90a") else target
    for source in sources(kernel):
        entries = re.findall(r"\.entry (\w+)\(", ptx(source).read_text())
        entry = next((e for e in entries if plain(e) == kernel), None)
        if entry is None:
            continue
        cubin = cuda_report.WORK / "roofline.cubin"
        log = cuda_report.run("ptxas", "-v", f"-arch={target}", "--entry", entry, ptx(source), "-o", cubin)
        code = sass.parse(cuda_report.run(str(cuda_report.find_nvdisasm()), "-hex", cubin))[entry]
        return Compiled(cuda_report.parse_ptxas(log)[entry].registers, main_turn(code, per_tile), copying_turn(code))
    raise SystemExit(f"cuda_roofline: no source has {kernel}")


def is_tensor(instruction: Instruction) -> bool:
    return instruction.name in TENSOR


def loaded_bytes(instruction: Instruction) -> int:
    """Of a warp, from global memory. Single elements are loaded where rows are not aligned, beside wide loads that are
    predicated the other way, and count nothing; what a bulk copy brings its name does not tell."""
    width = element_bits(instruction)
    return WARP * width // 8 if width >= 32 else 0


def features(instruction: Instruction) -> tuple[int, ...]:
    """Tensor operations, bytes loaded, special functions; less the reciprocal in a division of integers, which PTX does
    not show."""
    special = (instruction.name == "MUFU") - (instruction.name == "I2F" and ".RP" in instruction.opcode)
    return tensor_flops(instruction), loaded_bytes(instruction), special


def main_turn(code: Sequence[Block], per_tile: Mapping[str, float]) -> Turn:
    """Round the innermost loop with the most tensor operations or, where there are none, the most bytes loaded. The way
    has all of these; its special functions and loads are as many as the emulated device has on average, or as near as
    can be; and it is the shortest of such. Where only some warps do a tile's special functions, it is a mean of ways
    with more and with fewer."""
    found = sass.loops(code)
    products = any(is_tensor(i) for block in code for i in block.code)
    most = 0 if products else 1  # the feature that a whole tile has most of
    wanted = is_tensor if products else lambda i: loaded_bytes(i) > 0
    ways = max(
        (sass.ways(code, loop, features) for loop in sass.innermost(found, code, wanted)),
        key=lambda ways: max((sums[most], -len(way)) for sums, way in ways.items()),
    )
    whole = max(sums[most] for sums in ways)
    ways = {sums: way for sums, way in ways.items() if sums[most] == whole}
    turns = per_tile["flops" if products else "loaded_bytes"] / whole
    loads = per_tile["loaded_bytes"] / turns
    by_special: dict[int, list[Instruction]] = {}
    for sums, way in sorted(ways.items(), key=lambda item: (abs(item[0][1] - loads), len(item[1]))):
        by_special.setdefault(sums[2], way)
    return at({special: turn(way) for special, way in by_special.items()}, per_tile["special"] / turns)


def at(turns: Mapping[int, Turn], special: float) -> Turn:
    """The turn with this number of special functions, or so, else the mean of two between which it lies, with the
    slower one's time: warps wait for each other."""
    nearest = min(turns, key=lambda found: abs(found - special))
    fewer = max((n for n in turns if n <= special), default=nearest)
    more = min((n for n in turns if n >= special), default=nearest)
    if abs(nearest - special) <= NEAR_SPECIAL * special or fewer == more:
        return turns[nearest]
    share = (special - fewer) / (more - fewer)
    counts = turns[more].counts * share + turns[fewer].counts * (1 - share)
    return replace(turns[more], counts=counts)


def turn(way: Sequence[Instruction]) -> Turn:
    flops, loaded, _ = sass.total(map(features, way))
    return Turn(count(way), flops, loaded, cycles_per_turn(way))


def copying_turn(code: Sequence[Block]) -> Turn | None:
    """Of warps that only copy, in kernels that give them fewer registers. Bulk copies, which one thread orders, count
    nothing beyond the loop that they are in."""
    if not any(i.name == "USETMAXREG" for block in code for i in block.code):
        return None
    tensor_blocks = {i for i, block in enumerate(code) if any(map(is_tensor, block.code))}
    loops = [loop for loop in sass.loops(code) if not loop.body & tensor_blocks]
    inner = sass.innermost(loops, code, lambda i: i.name == "LDGSTS")
    ways = [(sums[1], -len(way), way) for loop in inner for sums, way in sass.ways(code, loop, features).items()]
    return turn(max(ways, key=lambda way: way[:2])[2]) if ways else Turn(Counts(), 0, 1, 0)
