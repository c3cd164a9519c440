"""How training scales over processes of this machine, what they send, and JetMoE wrapped alike:
`python -m benchmarks.distributed [--quick] [--results FOLDER]`.

Processes have one thread each, on a CPU of their own as far as there are so many; what is compared takes turns. Where
processes share CPUs the clock says how that went, and the CPU time of all of them what the distribution costs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from moduleformer_ext.distributed.traffic import sent_for_parameters, sent_for_tokens
from moduleformer_ext.models import MoLMForCausalLM

from ..experiments.report import markdown_table, write_report
from ..machine import slug
from ..peers import jetmoe
from . import contestants
from .contestants import JETMOE, MOLM
from .ranks import Ranks

SIZES = (1, 2, 4)
WEAK, STRONG = "weak", "strong"
_LANES = 4
"""Of all processes in strong scaling; in weak scaling one process has a fourth of them."""
_ROUNDS = 9
RESULTS = Path(__file__).parent.parent / "results" / "distributed"


class _Times:
    """Steps of one contestant: the slowest process's clock, and the CPU time of all."""

    def __init__(self, ranks: Ranks, name: str, tokens: int) -> None:
        self.ranks = ranks
        self.name = name
        self.tokens = tokens
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def measure(self) -> None:
        walls, cpus = zip(*self.ranks.run(contestants.step, self.name), strict=True)
        self.wall.append(max(walls))
        self.cpu.append(sum(cpus))

    def record(self) -> dict[str, float]:
        """Medians of all steps but the first one."""
        wall, cpu = median(self.wall[1:]), median(self.cpu[1:])
        return {"step_seconds": wall, "cpu_seconds": cpu, "tokens": self.tokens, "cpu_per_token": cpu / self.tokens}


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--processes", type=int, nargs="+", choices=SIZES, default=SIZES, help="numbers of them")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="steps of each contestant")
    parser.add_argument("--results", type=Path, help="folder of the report")
    options = parser.parse_args(words)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    if not {1, 2} <= set(options.processes):
        parser.error(f"--processes must hold 1 and 2, which others are compared with, got {options.processes}")
    folder = options.results or RESULTS / f"{datetime.date.today()}-{slug()}"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        groups = {size: Ranks(size, Path(scratch) / str(size), pinned=True) for size in sorted(set(options.processes))}
        try:
            scaling = _scaling(groups, options)
            sent = _volumes(groups, options)
            wrapped = _wrapped(groups[2], options) if jetmoe.AVAILABLE else None
        finally:
            for group in groups.values():
                group.close()
    folder.mkdir(parents=True, exist_ok=True)
    _report(folder, load, scaling, sent, wrapped)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _scaling(groups: dict[int, Ranks], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    length = contestants.trained_config(options.quick).block_size
    times = {}
    for kind in (WEAK, STRONG):
        for size, group in groups.items():
            lanes = _LANES if kind == STRONG else _LANES // max(SIZES) * size
            for experts in (1, size) if size > 1 else (1,):
                name = f"{kind}, {_processes(size)}" + (", experts spread" if experts > 1 else "")
                group.run(contestants.make_trainer, name, lanes, experts, options.quick)
                times[name] = _Times(group, name, lanes * length)
    for _ in range(options.rounds):
        for each in times.values():
            each.measure()
    return {name: each.record() for name, each in times.items()}


def _volumes(groups: dict[int, Ranks], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Bytes that a process sends in a step of strong scaling, by kind, and the fewest; the mean over processes."""
    config = contestants.trained_config(options.quick)
    with torch.device("meta"):
        model = MoLMForCausalLM(config)
    found = {}
    for size, group in groups.items():
        for experts in (1, size) if size > 1 else ():
            name = _processes(size) + (", experts spread" if experts > 1 else "")
            own = group.run(contestants.sent, f"{STRONG}, {name}")
            measured = {kind: sum(sent[kind] for sent in own) / size for kind in own[0]}
            fewest = sum(sent_for_parameters(model, size, expert_parallel=experts).values())
            fewest += sent_for_tokens(config, _LANES // size * config.block_size, expert_parallel=experts)
            found[name] = {**measured, "fewest": fewest}
    return found


def _wrapped(group: Ranks, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    times = {}
    for name in (MOLM, JETMOE):
        group.run(contestants.make_wrapped, name, options.quick)
        times[name] = _Times(group, name, group.size * contestants.wrapped_size(options.quick)[1])
    for _ in range(options.rounds):
        for each in times.values():
            each.measure()
    return {name: each.record() for name, each in times.items()}


def _report(
    folder: Path,
    load: float,
    scaling: dict[str, dict[str, float]],
    sent: dict[str, dict[str, float]],
    wrapped: dict[str, dict[str, float]] | None,
) -> None:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = []
    for name, found in scaling.items():
        alone = scaling[f"{name.partition(',')[0]}, {_processes(1)}"]
        speed = alone["step_seconds"] / alone["tokens"] / (found["step_seconds"] / found["tokens"])
        rows.append([name, f"{speed:.2f}x", f"{found['cpu_per_token'] / alone['cpu_per_token']:.2f}x"])
    shares = (
        f"There are {cpus} CPUs, and there was a load of {load:.1f} before it began. More processes share them, and "
        f"cannot be faster than {cpus}. The CPU time of all processes for a token, against that of one process, is "
        "what the distribution costs."
    )
    head = ["training", "tokens per second against one process", "CPU time per token"]
    volumes = [
        [
            name,
            *(f"{found[kind] / 1e6:.2f}" for kind in ("gather", "scatter", "exchange", "reduce", "fewest")),
            f"{sum(value for kind, value in found.items() if kind != 'fewest') / found['fewest']:.3f}x",
        ]
        for name, found in sent.items()
    ]
    each, all_tokens = (scaling[f"{kind}, {_processes(1)}"]["tokens"] for kind in (WEAK, STRONG))
    paragraphs = [
        f"Weak scaling has {each} tokens a step for each process, strong scaling {all_tokens} in all: few against the "
        "parameters, so that what is sent weighs as on many processes. Steps of training in float32: forward, "
        "backward, AdamW.",
        shares,
        markdown_table(head, rows),
        "## What a process sends in a step",
        "In MB, counted as the collectives are called: parameters, gradients, tokens on their way to experts, sums. "
        "The fewest are calculated from the model alone, with experts that are chosen evenly.",
        markdown_table(["", "gather", "scatter", "exchange", "sums", "fewest", "sent / fewest"], volumes),
    ]
    if wrapped is not None:
        wall = wrapped[JETMOE]["step_seconds"] / wrapped[MOLM]["step_seconds"]
        cpu = wrapped[JETMOE]["cpu_seconds"] / wrapped[MOLM]["cpu_seconds"]
        paragraphs += [
            "## JetMoE of transformers, wrapped alike",
            "Each layer and the rest of the model a unit of FSDP2, two processes, forward and backward of "
            f"{wrapped[MOLM]['tokens']} tokens in float32, equal arithmetic: MoLM is {wall:.2f}x as fast by the clock, "
            f"{cpu:.2f}x by CPU time.",
        ]
    data = {"cpus": cpus, "load": load, "scaling": scaling, "sent": sent, "wrapped": wrapped}
    write_report(folder, "Several processes", paragraphs, data)


if __name__ == "__main__":
    main()
