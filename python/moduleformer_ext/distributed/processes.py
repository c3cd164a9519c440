"""The processes that train one model together, and how they agree: what one of them finds wrong, all of them refuse."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

Found = TypeVar("Found")
_TIMEOUT = timedelta(hours=2)
"""The longest wait for another process, as for the first one while it tokenises. One that dies is noticed at once."""
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "remote process", "Connection refused")


class ProcessLostError(ConnectionError):
    """Another process has ended, or does not answer."""


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started, or alone."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """Of one dimension, over all of them; None for a process that torchrun did not start."""
    store: Store | None = None

    @property
    def is_first(self) -> bool:
        """Whether it is this one that writes and prints."""
        return self.rank == 0

    def first(self, function: Callable[[], Found]) -> Found:
        """What the function gives on the first process, which alone calls it. Its error is raised on all."""
        own = _attempt(function) if self.is_first else None
        shared = [own]
        if self.size > 1:
            dist.broadcast_object_list(shared, src=0)
        # The first process keeps its own error, with the place where it was raised.
        return _result(own if self.is_first else shared[0])

    def together(self, function: Callable[[], Found]) -> Found:
        """Call the function on every process. If it fails on any, all raise the error of the first of these."""
        own = _attempt(function)
        if self.size > 1:
            errors = self._gather(own if isinstance(own, _Failure) else None)
            if (failure := next((error for error in errors if error is not None), None)) is not None:
                raise failure.as_error() from (own.error if isinstance(own, _Failure) else None)
        return _result(own)

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise the same error on all processes unless these values, as JSON has them, are the same on all."""
        everyone = self._gather(dict(values))
        for rank, other in enumerate(everyone):
            if different := [name for name in everyone[0] if other.get(name) != everyone[0][name]]:
                name = different[0]
                raise ValueError(
                    f"processes: all must have the same {name}, got {everyone[0][name]!r} on process 0 and "
                    f"{other.get(name)!r} on process {rank}"
                )

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """The largest over the processes."""
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def own_part(self, count: int) -> slice:
        """This process's part of ``count`` things, a multiple of the number of processes."""
        own = count // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def may_speak(self) -> bool:
        """True for the first process that asks: of an error that all have, one speaks."""
        if self.store is None:
            return True
        try:
            return self.store.add("spoken", 1) == 1
        except RuntimeError:  # the store is gone with the one that held it
            return True

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def _gather(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value)
        return everyone


ALONE = Processes()


class _Failure:
    """An error on its way to the other processes, which may lack its class."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error
        self.kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == "builtins")
        self.message = str(error)

    def __getstate__(self) -> tuple[str, str]:
        return self.kind, self.message

    def __setstate__(self, state: tuple[str, str]) -> None:
        self.kind, self.message = state
        self.error = None

    def as_error(self) -> BaseException:
        return self.error or getattr(builtins, self.kind)(self.message)


def _attempt(function: Callable[[], Found]) -> Found | _Failure:
    try:
        return function()
    except Exception as error:
        return _Failure(error)


def _result(outcome: Any) -> Any:
    if isinstance(outcome, _Failure):
        raise outcome.as_error()
    return outcome


def started_by_torchrun() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def is_restart() -> bool:
    """Whether torchrun started this process in place of one that failed."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def own_device(name: str) -> torch.device:
    """The device of a configuration on this process: of several GPUs, its own."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and started_by_torchrun():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun started together with this one, connected for as long as the block runs; without
    torchrun, this one alone. Tensors on the CPU travel by gloo, on a GPU by nccl.

    Errors that leave the block have an attribute ``said_by_another``, false on the first process only that has one.

    Raises:
        ProcessLostError: another one ended before the block did.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    own = own_device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    shared, rank, size = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
    # torchrun's store outlives a restart, and with it the addresses of the processes before.
    store = PrefixStore(f"moduleformer_ext/{_restarts()}", shared)
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    processes = Processes(rank, size, init_device_mesh(own.type, (size,), mesh_dim_names=("data",)), store)
    try:
        yield processes
    except Exception as error:
        shown = error if size == 1 else _lost(error)
        shown.said_by_another = not processes.may_speak()  # type: ignore[attr-defined]
        raise shown from (None if shown is error else error)
    finally:
        dist.destroy_process_group()


def _lost(error: Exception) -> Exception:
    """A ProcessLostError if that is what the error means, else itself."""
    text = str(error).strip()
    if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or any(w in text for w in _LOST)):
        return ProcessLostError(
            f"another process of this run has ended or does not answer; continue with --resume ({text.splitlines()[0]})"
        )
    return error
