"""Machine code as nvdisasm lists it, its loops, and the path through a loop that its steady state takes.

A main loop is found by control flow: a back edge goes to a block that dominates it, and the loop is what reaches that
edge without leaving. Branches inside a loop choose between a whole tile and its exceptions (masks, ends of rows), so
that one way through the body is counted, not the listing; machine_code.py says which.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

LABEL = re.compile(r"^\s*(\.L_x_\d+):")
CODE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);\s*/\* 0x([0-9a-f]{16}) \*/")
REST = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Instruction:
    """One line of a listing. `control` is the upper half of its encoding, where the compiler says what to wait for."""

    opcode: str  # with modifiers: HMMA.16816.F32.BF16
    operands: str
    predicate: str = ""
    control: int = 0

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> str | None:
        found = TARGET.search(self.operands)
        return found[1] if found else None

    # Fields as in "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking" (arXiv 1804.06826), chapter 2.1,
    # which later architectures keep.
    @property
    def stall(self) -> int:
        """Cycles until the warp's next instruction may issue."""
        return self.control >> 41 & 15

    @property
    def write_barrier(self) -> int | None:
        """The scoreboard that tells that the result is there; None if the latency is fixed."""
        barrier = self.control >> 46 & 7
        return None if barrier == 7 else barrier

    @property
    def read_barrier(self) -> int | None:
        """The scoreboard that tells that the operands were read."""
        barrier = self.control >> 49 & 7
        return None if barrier == 7 else barrier

    @property
    def waits(self) -> tuple[int, ...]:
        """The scoreboards that this instruction waits for."""
        mask = self.control >> 52 & 63
        return tuple(i for i in range(6) if mask >> i & 1)


LEAVING = ("BRA", "BRX", "BRXU", "CALL", "EXIT", "RET")


@dataclass
class Block:
    """Instructions without a branch but at the end, and the blocks that may follow."""

    code: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    header: int
    body: frozenset[int]
    latches: tuple[int, ...]  # blocks with an edge back to the header


def parse(text: str) -> dict[str, list[Block]]:
    """Control flow of each kernel of `nvdisasm -hex`."""
    sections = re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]
    return {re.split(r'[,\s"]', section, maxsplit=1)[0]: blocks(section) for section in sections}


def blocks(section: str) -> list[Block]:
    found, labels, code = [Block()], {}, []
    for line in section.splitlines():
        if label := LABEL.match(line):
            if found[-1].code:
                found.append(Block())
            labels[label[1]] = len(found) - 1
        elif match := CODE.search(line):
            code = [match[3], match[4].strip(), match[2] or ""]
        elif code and (rest := REST.match(line)):
            instruction = Instruction(*code, control=int(rest[1], 16))
            code = []
            found[-1].code.append(instruction)
            if instruction.name in LEAVING:
                found.append(Block())
    for i, block in enumerate(found):
        last = block.code[-1] if block.code else None
        leaves = last is not None and last.name in LEAVING
        taken = [labels[name] for name in TARGET.findall(last.operands) if name in labels] if leaves else []
        # BRA.DIV goes where the lanes of a warp have parted, which no kernel here lets happen for long.
        if leaves and last.opcode.startswith("BRA.DIV"):
            taken = []
        # A call returns to what follows it. ptxas also writes a conditional one as a far jump, where not taking it goes
        # on to what follows.
        conditional = leaves and (
            last.name == "CALL"
            or last.predicate
            or last.opcode.startswith("BRA.DIV")
            or len(last.operands.split(",")) > 1
        )
        falls = not leaves or conditional
        block.next = taken + ([i + 1] if falls and i + 1 < len(found) else [])
    return found


def predecessors(code: Sequence[Block]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in code]
    for i, block in enumerate(code):
        for following in block.next:
            found[following].append(i)
    return found


def reachable(code: Sequence[Block]) -> set[int]:
    seen, waiting = {0}, [0]
    while waiting:
        following = set(code[waiting.pop()].next) - seen
        seen |= following
        waiting += following
    return seen


def dominators(code: Sequence[Block]) -> list[int]:
    """Per block, the set (as bits) of blocks that every way from the entry to it goes through; 0 if there is none."""
    before, everything, there = predecessors(code), (1 << len(code)) - 1, reachable(code)
    found = [1] + [everything if i in there else 0 for i in range(1, len(code))]
    changed = True
    while changed:
        changed = False
        for i in sorted(there - {0}):
            common = everything
            for p in before[i]:
                common &= found[p] if p in there else everything
            common |= 1 << i
            if common != found[i]:
                found[i], changed = common, True
    return found


def loops(code: Sequence[Block]) -> list[Loop]:
    """Natural loops, those of one header as one."""
    dominating, before = dominators(code), predecessors(code)
    latches: dict[int, list[int]] = {}
    for i, block in enumerate(code):
        for following in block.next:
            if dominating[i] >> following & 1:
                latches.setdefault(following, []).append(i)
    found = []
    for header, tails in latches.items():
        body, waiting = {header}, list(tails)
        while waiting:
            block = waiting.pop()
            if block not in body and dominating[block]:
                body.add(block)
                waiting += before[block]
        found.append(Loop(header, frozenset(body), tuple(tails)))
    return found


def innermost(found: Iterable[Loop], code: Sequence[Block], wanted: Callable[[Instruction], bool]) -> list[Loop]:
    """Loops with a wanted instruction, and none inside them that has one, too."""
    having = [loop for loop in found if any(wanted(i) for block in loop.body for i in code[block].code)]
    return [loop for loop in having if not any(other.body < loop.body for other in having)]


def ways(
    code: Sequence[Block], loop: Loop, features: Callable[[Instruction], tuple[int, ...]]
) -> dict[tuple[int, ...], list[Instruction]]:
    """The shortest way once round a loop for each sum of features that a way may have; loops inside are gone through
    once."""
    order = topological(code, loop)
    place = {block: i for i, block in enumerate(order)}
    best: dict[int, dict[tuple[int, ...], tuple[int, tuple]]] = {}  # sum: instructions, and blocks as a linked list
    for block in reversed(order):
        own = total(features(i) for i in code[block].code)
        found: dict[tuple[int, ...], tuple[int, tuple]] = {}
        if block in loop.latches:
            found[own] = (len(code[block].code), (block, None))
        for following in code[block].next:
            if place.get(following, -1) <= place[block]:
                continue
            for sums, (length, rest) in best[following].items():
                key, size = tuple(map(sum, zip(own, sums, strict=True))), length + len(code[block].code)
                if key not in found or size < found[key][0]:
                    found[key] = (size, (block, rest))
        best[block] = found
    return {
        key: [i for block in linked(blocks) for i in code[block].code] for key, (_, blocks) in best[loop.header].items()
    }


def linked(blocks: tuple | None) -> Iterable[int]:
    while blocks is not None:
        block, blocks = blocks
        yield block


def topological(code: Sequence[Block], loop: Loop) -> list[int]:
    """Blocks of a loop from its header on, each after those that lead to it except by edges back."""
    done: list[int] = []
    seen = {loop.header}
    stack = [(loop.header, iter(code[loop.header].next))]
    while stack:
        block, following = stack[-1]
        for n in following:
            if n in loop.body and n not in seen:
                seen.add(n)
                stack.append((n, iter(code[n].next)))
                break
        else:
            done.append(block)
            stack.pop()
    return done[::-1]


def total(values: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*values, strict=True)))


def element_bits(instruction: Instruction) -> int:
    """That a lane loads from global memory; 0 for other instructions."""
    if instruction.name not in ("LDG", "LDGSTS", "LD"):
        return 0
    width = re.search(r"\.[US]?(8|16|32|64|128)(?:\.|$)", instruction.opcode)
    return int(width[1]) if width else 32
