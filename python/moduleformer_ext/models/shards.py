"""Weights in shards, as several processes write them: the safetensors files of a distributed checkpoint."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moduleformer_ext.nn.segments import join_in_state, whole_name

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

SHARDS = "shards"
"""The folder of them, beside config.json."""
MODEL = "model."
"""Beginning of the names of the model's own tensors in them."""
HISTORY, RANDOM = "history.", "rng."
"""Of those that every process writes an equal part of, along their first dimension."""
_FILE = re.compile(r"shard-(?P<process>\d+)-model-(?P<kind>\d+)-of-(?P<kinds>\d+)\.safetensors")


def has_shards(directory: Path) -> bool:
    """Whether a checkpoint is one of several processes."""
    return (directory / SHARDS).is_dir()


def described_shards(directory: Path) -> dict[str, TensorStorageMetadata]:
    """Size, type and pieces of every tensor in the shards of a checkpoint.

    Raises:
        ValueError: a shard is damaged or missing, or holds a piece of another checkpoint.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    folder = directory / SHARDS
    files = [match for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))]
    if (absent := _absent(files)) is not None:
        raise ValueError(f"'{folder}' does not hold whole shards: {absent}")
    processes = max(int(file["process"]) for file in files)
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"'{folder}' does not hold whole shards: {error!r}") from error
    described: dict[str, TensorStorageMetadata] = metadata.state_dict_metadata  # type: ignore[assignment]
    for name, tensor in described.items():
        held = sum(chunk.sizes.numel() for chunk in tensor.chunks)
        if held != tensor.size.numel():
            raise ValueError(
                f"'{folder}' does not hold whole shards: {name} must have {tensor.size.numel()} elements, got {held}"
            )
        # The sizes are those of the pieces that were found: without the last ones they are smaller.
        if name.startswith((HISTORY, RANDOM)) and len(tensor.chunks) != processes:
            raise ValueError(
                f"'{folder}' does not hold whole shards: {name} must have {processes} pieces, got {len(tensor.chunks)}"
            )
    return described


def _absent(files: list[re.Match[str]]) -> str | None:
    """What the names of the files say is missing. A file that only some processes lack shows by its tensors."""
    if not files:
        return "it must have files shard-...-model-...-of-....safetensors, got none"
    count = max(int(file["kinds"]) for file in files)
    missing = set(range(1, count + 1)) - {int(file["kind"]) for file in files}
    return f"it must have files of {count} kinds, got none of kind {min(missing)}" if missing else None


@contextmanager
def as_errors(directory: Path) -> Iterator[None]:
    """What goes wrong in the engine of distributed checkpoints on one process is raised on all, as a ValueError or
    OSError that names the checkpoint.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        known = OSError if isinstance(cause, OSError) else ValueError
        raise known(f"checkpoint: '{directory}': process {rank}: {cause}") from error


def read_shards(directory: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The whole tensors of some names in the shards of a checkpoint, by one process.

    Raises:
        ValueError, OSError: as :func:`described_shards`, and for one that cannot be read.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in described_shards(directory).items()
        if wanted(name)
    }
    with as_errors(directory), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as asked for: no_dist
        load(state, storage_reader=HuggingFaceStorageReader(str(directory / SHARDS)), no_dist=True)
    return state


def read_model_shards(directory: Path) -> dict[str, Tensor]:
    """The whole model in the shards of a checkpoint, under the names of a state dict; by one process."""
    stored = read_shards(directory, lambda name: name.startswith(MODEL))
    state = {name.removeprefix(MODEL): tensor for name, tensor in stored.items()}
    for name in {whole_name(name) for name in state}:
        if {f"{name}_old", f"{name}_new"} <= state.keys():
            join_in_state(state, name)
    return state
