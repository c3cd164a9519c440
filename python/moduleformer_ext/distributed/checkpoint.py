"""Checkpoints in shards: every process writes and reads its own part, and any number of them may read."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moduleformer_ext.models.shards import SHARDS, as_errors


@dataclass(frozen=True)
class BackgroundWrite:
    """Writing that goes on while the caller does something else."""

    directory: Path
    pending: Future[object]

    def done(self) -> bool:
        """Whether this process has nothing left to write."""
        return self.pending.done()

    def wait(self) -> None:
        """Wait for it.

        Raises:
            ValueError, OSError: some process failed.
        """
        with as_errors(self.directory):
            self.pending.result()


def save_shards(
    directory: Path, tensors: Mapping[str, Tensor], *, background: dist.ProcessGroup | None = None
) -> BackgroundWrite | None:
    """Write the shards of a checkpoint, all processes together; nothing is pickled.

    Args:
        tensors: the same names on every process, none empty. Names with the same part before the first dot (of
            moments, the second one) go to one file, which is what is serialised at once.
        background: of the same processes, on the CPU: the tensors are copied, and written while the caller goes on.

    Returns:
        In the background: what to wait for.
    """
    kinds = sorted({_file_of(name) for name in tensors})
    numbers = {name: kinds.index(_file_of(name)) + 1 for name in tensors}
    writer = HuggingFaceStorageWriter(str(directory / SHARDS), numbers, save_distributed=True)
    with as_errors(directory):
        if background is None:
            save(dict(tensors), storage_writer=writer)
            return None
        pending = async_save(dict(tensors), storage_writer=writer, process_group=background)
    assert isinstance(pending, Future)
    return BackgroundWrite(directory, pending)


def _file_of(name: str) -> str:
    return ".".join(name.split(".")[: 2 if name.startswith("optimizer.") else 1])


def load_shards(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, sharded in any way, with those of a checkpoint that have their names and sizes; all processes
    together.
    """
    reader = HuggingFaceStorageReader(str(directory / SHARDS))
    with as_errors(directory):
        load(dict(tensors), storage_reader=reader)


def by_lanes(own: Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor whose first dimension is spread over the processes, of which ``own`` is this one's part."""
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False)


def empty_by_lanes(size: torch.Size, dtype: torch.dtype, mesh: DeviceMesh) -> DTensor:
    """A tensor of ``size`` whose first dimension, a multiple of the number of processes, is spread over them."""
    return by_lanes(torch.empty(size[0] // mesh.size(), *size[1:], dtype=dtype, device=mesh.device_type), mesh)
