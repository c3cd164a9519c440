"""From instructions to cycles of the units that they keep busy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from roofline.machines import INTEGERS, ISSUES, SHARED_BYTES, SHUFFLES, SPECIAL, WARP, Gpu
from roofline.sass import Instruction

FP32 = {"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2", "IMAD", "FSWZADD"}  # IMAD shares the multipliers
INTEGER = {
    *(
        "IADD",
        "IADD3",
        "LOP",
        "LOP3",
        "PLOP3",
        "SHF",
        "SHL",
        "SHR",
        "LEA",
        "PRMT",
        "SEL",
        "FSEL",
        "MOV",
        "SGXT",
        "BMSK",
    ),
    *("ISETP", "FSETP", "FSET", "IMNMX", "FMNMX", "FMNMX3", "VIMNMX", "VIMNMX3", "VIADD", "VIADDMNMX", "IABS", "FCHK"),
    *("P2R", "R2P", "F2FP", "I2IP", "HADD2", "HMUL2", "HFMA2", "HSETP2", "HMNMX2"),
}
SPECIAL_FUNCTIONS = {"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV", "F2IP", "I2FP", "RRO"}
TENSOR = {"HMMA", "HGMMA", "IMMA", "QGMMA"}


def tensor_flops(instruction: Instruction) -> int:
    """Of a warp: HMMA.16816 multiplies 16 x 8 x 16, HGMMA.64x128x16 is shared by four warps."""
    if instruction.name == "HGMMA":
        m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.opcode).groups())
        return 2 * m * n * k // 4
    if instruction.name == "HMMA":
        depth = re.search(r"\.168(4|8|16)\b", instruction.opcode)[1]
        return 2 * 16 * 8 * int(depth)
    return 0


def wgmma_bytes(instruction: Instruction) -> int:
    """Of 16-bit operands that a warp's part of a wgmma reads from shared memory: B always, A unless in registers."""
    if instruction.name != "HGMMA":
        return 0
    m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.opcode).groups())
    operands = instruction.operands.split(",")
    a_in_registers = re.match(r"\s*R\d+", operands[1]) is not None
    return 2 * k * (n + (0 if a_in_registers else m)) // 4


@dataclass(frozen=True)
class Counts:
    """Of a warp, or of all warps of a tile. Shared memory and global bytes come from the emulated device, but for
    wgmma's operands."""

    issued: float = 0
    hmma_flops: float = 0
    wgmma_flops: float = 0
    special: float = 0
    fp32: float = 0
    integer: float = 0
    shuffles: float = 0
    wavefronts: float = 0
    global_bytes: float = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, times: float) -> Counts:
        return Counts(*(times * getattr(self, name) for name in self.__dataclass_fields__))


def count(instructions: Iterable[Instruction]) -> Counts:
    """What one warp asks for that goes this way."""
    issued = special = fp32 = integer = shuffles = hmma = wgmma = wgmma_read = 0
    for i in instructions:
        issued += 1
        special += i.name in SPECIAL_FUNCTIONS
        fp32 += i.name in FP32
        integer += i.name in INTEGER
        shuffles += i.name == "SHFL"
        hmma += tensor_flops(i) if i.name == "HMMA" else 0
        wgmma += tensor_flops(i) if i.name == "HGMMA" else 0
        wgmma_read += wgmma_bytes(i)
    return Counts(issued, hmma, wgmma, special, fp32, integer, shuffles, wgmma_read / SHARED_BYTES)


def cycles(counts: Counts, gpu: Gpu) -> dict[str, float]:
    """Of a multiprocessor, by unit, if each were the only one to wait for."""
    return {
        "issue": counts.issued / ISSUES,
        "tensor": counts.hmma_flops / gpu.mma_per_clock + counts.wgmma_flops / gpu.tensor_per_clock,
        "special functions": WARP * counts.special / SPECIAL,
        "fp32": WARP * counts.fp32 / gpu.fp32,
        "integer": WARP * counts.integer / INTEGERS,
        "shuffles": WARP * counts.shuffles / SHUFFLES,
        "shared memory": counts.wavefronts,
        "L2": counts.global_bytes / gpu.l2_per_clock,
    }


def bound(found: Mapping[str, float]) -> tuple[float, str]:
    """The longest of the units' cycles, and whose they are."""
    unit = max(found, key=found.__getitem__)
    return found[unit], unit
