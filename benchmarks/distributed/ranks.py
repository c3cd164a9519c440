"""Processes that wait for functions to run together: torch is imported once for all of them, and what is measured on
one, two and four processes can take turns.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """``size`` processes of a gloo group, each with one thread.

    Args:
        store: a file of the group's own.
        pinned: to one CPU each, as far as there are so many.
        patience: seconds within which all must answer, else they are killed; a collective waits for half of them. None
            is for ever.
    """

    def __init__(self, size: int, store: Path, *, pinned: bool = False, patience: float | None = None) -> None:
        self.size = size
        self.patience = patience
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, size, str(store), pinned, patience), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What function(*arguments), of a module that can be imported, gives on every rank, in their order.

        Raises:
            RuntimeError: it failed on some, or took longer than ``patience``.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        deadline = None if self.patience is None else time.monotonic() + self.patience
        answers = [_answer(pipe, deadline) for pipe in self._pipes]
        if None in answers:  # or a late answer would be taken for that of the next function
            for process in self._processes:
                process.kill()
        late = False, f"no answer within {self.patience} s"
        all_answers = [late if answer is None else answer for answer in answers]
        if failed := [f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(all_answers) if not good]:
            raise RuntimeError("\n".join(failed))
        return [answer for _, answer in all_answers]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


def _answer(pipe: Connection, deadline: float | None) -> tuple[bool, Any] | None:
    left = None if deadline is None else max(deadline - time.monotonic(), 0)
    return pipe.recv() if pipe.poll(left) else None


def _serve(pipe: Connection, rank: int, size: int, store: str, pinned: bool, patience: float | None) -> None:
    if pinned and hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[rank % len(cpus)]})
    torch.set_num_threads(1)
    timeout = None if patience is None else timedelta(seconds=patience / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while (work := pipe.recv()) is not None:
        function, arguments = work
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:  # those of checkpoints are no Exception
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
