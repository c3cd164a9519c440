"""Weights in shards, as several processes write them: the safetensors files of a distributed checkpoint."""

from __future__ import annotations

from collections.abc import Callable
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


def has_shards(directory: Path) -> bool:
    """Whether a checkpoint is one of several processes."""
    return (directory / SHARDS).is_dir()


def described_shards(directory: Path) -> dict[str, TensorStorageMetadata]:
    """Size, type and pieces of every tensor in the shards of a checkpoint.

    Raises:
        ValueError: a shard is damaged, or a piece is missing.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        metadata = HuggingFaceStorageReader(str(directory / SHARDS)).read_metadata()
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"'{directory / SHARDS}' does not hold whole shards: {error!r}") from error
    described: dict[str, TensorStorageMetadata] = metadata.state_dict_metadata  # type: ignore[assignment]
    for name, tensor in described.items():
        held = sum(chunk.sizes.numel() for chunk in tensor.chunks)
        if held != tensor.size.numel():
            raise ValueError(
                f"'{directory / SHARDS}' does not hold whole shards: {name} must have {tensor.size.numel()} elements, "
                f"got {held}"
            )
    return described


def read_shards(directory: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The whole tensors of some names in the shards of a checkpoint, by one process."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in described_shards(directory).items()
        if wanted(name)
    }
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
