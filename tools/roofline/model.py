"""Cycles per tile of a main loop, and from them the time of an op; pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from roofline.machines import Gpu
from roofline.units import Counts, cycles

ONE_WARP = "one warp's time"
MEMORY = "memory"
NEAR = 0.3  # between PTX and SASS


@dataclass(frozen=True)
class Turn:
    """Once round a loop, by one warp."""

    counts: Counts
    flops: float
    loaded: float  # bytes from global memory
    cycles: float  # of the warp alone


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of a kernel, and the emulated device's figures per tile and per unit of work."""

    name: str
    registers: int
    threads: int
    shared_bytes: int
    blocks_per_unit: float
    main: Turn
    copying: Turn | None  # of the warps that do nothing else
    per_tile: Mapping[str, float]
    per_unit: Mapping[str, float]

    @property
    def turns(self) -> float:
        """Of warps round the main loop, per tile."""
        if self.per_tile["flops"]:
            return self.per_tile["flops"] / self.main.flops
        return self.per_tile["loaded_bytes"] / self.main.loaded

    @property
    def explained(self) -> bool:
        """Whether turns of the main loop account for a tile's loads and instructions; not so where loops inside it go
        round more than once. Not asked where other warps copy."""

        def near(of_turn: float, counted: float) -> bool:
            return abs(of_turn * self.turns - counted) <= NEAR * counted

        loads = near(self.main.loaded, self.per_tile["loaded_bytes"])
        return self.copying is not None or (loads and near(self.main.counts.issued, self.per_tile["issued"]))

    @property
    def warp_cycles(self) -> float:
        """Of one warp alone, for all of a tile's turns."""
        scale = 1 if self.explained else self.per_tile["issued"] / (self.main.counts.issued * self.turns)
        return self.main.cycles * self.turns * scale

    @property
    def multiplying_warps(self) -> int:
        """Of a block; a warpgroup that only copies is not among them."""
        return self.threads // 32 - (4 if self.copying else 0)

    def tile(self) -> Counts:
        """All that the warps ask for, for one tile; as PTX has it where the loop does not account for it."""
        found = self.main.counts * self.turns
        if not self.explained:
            products = Counts(hmma_flops=found.hmma_flops, wgmma_flops=found.wgmma_flops, wavefronts=found.wavefronts)
            return products + emulated(self.per_tile, issues=True)
        if self.copying:
            found += self.copying.counts * (self.per_tile["cp_async_bytes"] / self.copying.loaded)
        return found + emulated(self.per_tile, issues=False)

    def unit(self) -> Counts:
        """For the beginning and end of one unit of work, in PTX. Its products are those of the loop's kind."""
        return emulated(self.per_unit, issues=True) + Counts(
            hmma_flops=0 if self.main.counts.wgmma_flops else self.per_unit["flops"],
            wgmma_flops=self.per_unit["flops"] if self.main.counts.wgmma_flops else 0,
        )


def emulated(figures: Mapping[str, float], issues: bool) -> Counts:
    found = Counts(wavefronts=figures["wavefronts"], global_bytes=figures["global_bytes"])
    if issues:
        found += Counts(issued=figures["issued"], special=figures["special"], shuffles=figures["shuffles"])
    return found


def resident_blocks(kernel: Kernel, gpu: Gpu) -> int:
    warps = gpu.architecture.resident_warps(kernel.registers, kernel.threads, kernel.shared_bytes)
    return warps // -(-kernel.threads // 32)


def tile_cycles(kernel: Kernel, gpu: Gpu, blocks: int | None = None) -> dict[str, float]:
    """Cycles of a multiprocessor per tile, by unit. With `blocks` of them there, or as many as fit, each warp takes its
    own time for its turns."""
    blocks = resident_blocks(kernel, gpu) if blocks is None else blocks
    alone = kernel.warp_cycles / (kernel.multiplying_warps * blocks)
    return {**cycles(kernel.tile(), gpu), ONE_WARP: alone}


@dataclass(frozen=True)
class Work:
    """What a kernel does in all its launches: units of work, tiles, bytes that memory must move."""

    units: float
    tiles: float
    memory_bytes: float
    launches: int = 1


def unit_alone(kernel: Kernel, blocks: int) -> float:
    """A warp's own time for a unit's beginning and end: as many cycles per instruction as in the loop."""
    per_instruction = kernel.main.cycles / kernel.main.counts.issued
    return per_instruction * kernel.per_unit["issued"] / (kernel.multiplying_warps * blocks)


def seconds(kernel: Kernel, work: Work, gpu: Gpu) -> dict[str, float]:
    """By unit, if each were the only one to wait for. Blocks are dealt to multiprocessors as wholes."""
    blocks = work.units * kernel.blocks_per_unit / work.launches
    here = math.ceil(blocks / gpu.multiprocessors)  # where there are most
    uneven = here * gpu.multiprocessors / blocks
    per_tile = tile_cycles(kernel, gpu, min(here, resident_blocks(kernel, gpu)))
    per_unit = {**cycles(kernel.unit(), gpu), ONE_WARP: unit_alone(kernel, min(here, resident_blocks(kernel, gpu)))}
    share = uneven / gpu.multiprocessors / gpu.clock
    found = {unit: (per_tile[unit] * work.tiles + per_unit[unit] * work.units) * share for unit in per_tile}
    return {**found, MEMORY: work.memory_bytes / gpu.memory_bytes}


def total_seconds(parts: Sequence[tuple[Kernel, Work]], gpu: Gpu) -> tuple[float, str]:
    """Of kernels that follow one another, and what bounds the longest of them."""
    bounds = [max((time, unit) for unit, time in seconds(kernel, work, gpu).items()) for kernel, work in parts]
    return sum(time for time, _ in bounds), max(bounds)[1]
