"""The least time of one warp on a path that it takes again and again, were it alone on its multiprocessor.

A warp issues in order. The compiler writes into each instruction how many cycles the next one must wait (fixed
latencies, among them mma's) and which scoreboards it waits for, that is, for results whose latency varies. Those are
taken at what microbenchmarks found on an idle GPU; copies that are under way for a whole turn of the loop, and barriers
with other warps, cost nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence

from roofline.sass import Instruction, element_bits

# Cycles. Shared memory, L2 and memory: Luo et al., arXiv 2402.13499; ldmatrix: Sun et al., arXiv 2206.02874; special
# functions: Abdelkhalik et al., arXiv 2208.11174; the rest is taken like shared memory.
LATENCY = {"LDSM": 33, "LDS": 29, "SHFL": 29, "MUFU": 18, "LDG": 480, "LD": 480, "ATOMG": 260}
OTHER = 29
READ = 12  # until a source register may be overwritten
TURNS = 4  # so that what one turn leaves for the next shows


def latency(instruction: Instruction) -> int:
    if 0 < element_bits(instruction) < 32:  # predicated off (machine_code.loaded_bytes)
        return 0
    return LATENCY.get(instruction.name, OTHER)


def cycles_per_turn(path: Sequence[Instruction]) -> float:
    """Of the turns after the first, on average."""
    clock, ready, starts = 0, [0] * 6, []
    for _ in range(TURNS):
        starts.append(clock)
        for i in path:
            clock = max([clock, *(ready[barrier] for barrier in i.waits)])
            if i.write_barrier is not None:
                ready[i.write_barrier] = max(ready[i.write_barrier], clock + latency(i))
            if i.read_barrier is not None:
                ready[i.read_barrier] = max(ready[i.read_barrier], clock + READ)
            clock += max(1, i.stall)
    return (clock - starts[1]) / (TURNS - 1)
