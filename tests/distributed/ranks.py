"""Processes that wait for functions to run together, so that torch is imported once for all tests."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """``size`` processes of a gloo group."""

    def __init__(self, size: int, store: Path) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, str(store)), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What function(*arguments), of a module of tests, gives on every rank, in their order."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() if pipe.poll(120) else (False, "no answer") for pipe in self._pipes]
        failed = [f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(answers) if not good]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while (work := pipe.recv()) is not None:
        function, arguments = work
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:  # those of checkpoints are no Exception
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
