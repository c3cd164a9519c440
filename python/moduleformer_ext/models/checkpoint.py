"""Models on disk: our own directories, written atomically, and published ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import TypedDict  # pydantic reads the typing module's from Python 3.12 on

from moduleformer_ext.files import load_tensors, parse_json, read_json, replacing, save_tensors, write_file
from moduleformer_ext.models.config import MoLMConfig
from moduleformer_ext.models.published import FORMAT, without_aliases
from moduleformer_ext.models.shards import has_shards, read_model_shards
from moduleformer_ext.models.state import canonical_state, router_dtype

if TYPE_CHECKING:
    from moduleformer_ext.models.modeling import MoLMForCausalLM

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_SINGLE_FILES = (WEIGHTS_FILE, "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def save_pretrained(model: MoLMForCausalLM, directory: str | Path) -> None:
    """Write ``model.safetensors`` and ``config.json``, replacing earlier ones.

    Interrupted at any moment, the directory holds the old model or the new one, never a mixture: the weights file
    carries the configuration in its header, and that copy is the one that is read; config.json is for people and
    other tools. Weights are written in the form of :func:`~moduleformer_ext.models.state.canonical_state`; a sharded
    model is gathered by all processes and written by the first.

    Raises:
        ValueError: the model holds other weights than its configuration says; the message lists the tensors.
    """
    directory = Path(directory)
    config = json.dumps(model.config.to_dict(), indent=2) + "\n"
    with _one_writer(model) as is_writer:
        try:
            state = canonical_state(model, keep=is_writer)
        except ValueError as error:
            raise ValueError(f"save_pretrained: {error}") from error
        if is_writer:
            directory.mkdir(parents=True, exist_ok=True)
            with replacing(directory / WEIGHTS_FILE) as path:
                save_tensors(path, _unshared(state), {"format": FORMAT, "config": config})
            precise = router_dtype(state)
            fields = model.config.to_file() | ({"router_dtype": precise} if precise else {})
            write_file(directory / CONFIG_FILE, json.dumps(fields, indent=2) + "\n")


@contextmanager
def _one_writer(model: MoLMForCausalLM) -> Iterator[bool]:
    """Whether this process writes: the first of those that a model is sharded over, for which the others wait."""
    mesh = next((p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")), None)
    try:
        yield mesh is None or mesh.get_rank() == int(mesh.mesh.flatten()[0])
    finally:
        if mesh is not None:
            dist.barrier()


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one storage, as those of weights tied by hand, are written one by one."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return unshared


def save_published(model: MoLMForCausalLM, directory: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Write config.json and weights in the published format, in one file or, where they are larger than
    ``max_shard_size``, bytes or a text such as "5GB", in several with an index.

    Neither durable nor atomic: give it a directory from ``files.new_directory``.

    Raises:
        ValueError: the model has something that the format cannot say; the message names the field.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    directory = Path(directory)
    config, state = model.to_reference()
    state = _unshared(state)
    plan = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    write_file(directory / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    for name, tensors in plan.filename_to_tensors.items():
        save_tensors(directory / name, {tensor: state[tensor] for tensor in tensors}, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        write_file(directory / _INDEX_FILES[0], json.dumps(index, indent=2) + "\n")


def read_pretrained(directory: str | Path) -> tuple[MoLMConfig, dict[str, Tensor]]:
    """Configuration and weights of a directory that :func:`save_pretrained` wrote, or of a published MoLM's as it is
    downloaded.

    Published ones hold a config.json and weights as .safetensors or .bin (read with ``weights_only=True``), in one
    file or in shards with an index. Checkpoints of several processes are read by one as they are.

    Raises:
        FileNotFoundError: a file is missing; the message says which.
        ValueError: a file is damaged, or a field of the configuration wrong.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"from_pretrained: {directory} is not a directory")
    own = _own_config(directory / WEIGHTS_FILE)
    published = _read_json(directory / CONFIG_FILE) if own is None or (directory / CONFIG_FILE).is_file() else {}
    try:
        if own is not None:  # config.json may be of an earlier model, but not contradict itself
            without_aliases(published)
        config = MoLMConfig.from_reference(published) if own is None else MoLMConfig.from_dict(own)
        if quantised := published.get("quantization_config"):
            kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise ValueError(f"quantization_config must be absent, got {kind!r}; transformers reads quantised weights")
    except ValueError as error:
        raise ValueError(f"from_pretrained: '{directory}': {error}") from error
    return config, read_model_shards(directory) if has_shards(directory) else read_weights(directory)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a published directory."""
    for name in _SINGLE_FILES:
        if (directory / name).is_file():
            return _read_tensors(directory / name)
    for name in _INDEX_FILES:
        if (directory / name).is_file():
            return _read_shards(directory / name)
    raise FileNotFoundError(f"from_pretrained: {directory} has none of {', '.join(_SINGLE_FILES + _INDEX_FILES)}")


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a directory that :func:`save_pretrained` wrote, each read when it is asked for, and the ``config``
    of their model.
    """

    def __init__(self, directory: Path) -> None:
        own = _own_config(directory / WEIGHTS_FILE)
        if own is None:
            raise ValueError(f"'{directory}' must hold a model that save_pretrained wrote")
        self.config = MoLMConfig.from_dict(own)
        self._file = safe_open(directory / WEIGHTS_FILE, framework="pt")
        self._names = dict(zip(self._file.keys(), self._file.keys(), strict=True))
        if self.config.tie_word_embeddings:
            self._names["lm_head.weight"] = "transformer.wte.weight"

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Index(TypedDict):
    weight_map: dict[str, str]
    """Tensor -> file."""


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index, _Index)["weight_map"]
    state: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ValueError(f"from_pretrained: {index.name} must name files beside it, got {shard!r}")
        path = index.parent / shard
        if not path.is_file():
            raise FileNotFoundError(f"from_pretrained: {index.name} names {shard}, which is not in {index.parent}")
        state |= _read_tensors(path)
    absent = sorted(set(weight_map) - set(state))
    if absent:
        raise ValueError(f"from_pretrained: tensors named by {index.name} are in no shard: {', '.join(absent)}")
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))  # old ones are no zip
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"'{path}' cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: {path} is missing")
    return read_json(path, dict[str, Any])


def _own_config(weights: Path) -> dict[str, Any] | None:
    """The configuration in a weights file of ours, None for anybody else's."""
    if not weights.is_file():
        return None
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"'{weights}' is not a whole safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        return None
    return parse_json(metadata.get("config", ""), dict[str, Any], f"'{weights}'")
