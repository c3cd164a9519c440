"""Processes that wait for functions to run together: torch is imported once for all of them, and what is measured on
one, two and four processes can take turns.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_ANSWER_SECONDS = 120
_COLLECTIVE_SECONDS = 60
"""Less, so that a collective that waits in vain is the answer."""


class Ranks:
    """``size`` processes of a gloo group, each with one thread; ``pinned`` to one CPU each as far as there are so many.

    ``store`` is a file of the group's own.
    """

    def __init__(self, size: int, store: Path, *, pinned: bool = False) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, str(store), pinned), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What function(*arguments), of a module that can be imported, gives on every rank, in their order.

        Raises:
            RuntimeError: it failed on some, or gave no answer within two minutes.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        none = False, f"no answer within {_ANSWER_SECONDS} s"
        answers = [pipe.recv() if pipe.poll(_ANSWER_SECONDS) else none for pipe in self._pipes]
        if failed := [f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(answers) if not good]:
            raise RuntimeError("\n".join(failed))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(pipe: Connection, rank: int, size: int, store: str, pinned: bool) -> None:
    if pinned and hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[rank % len(cpus)]})
    torch.set_num_threads(1)
    timeout = timedelta(seconds=_COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while (work := pipe.recv()) is not None:
        function, arguments = work
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:  # those of checkpoints are no Exception
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
