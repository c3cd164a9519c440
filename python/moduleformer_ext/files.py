"""Files and folders, written durably and all or nothing: what a reader finds under a final name is complete.

What is read is checked: a damaged file is one line with its name. Modes follow the umask. Files are written without
pydantic, which the benchmarks on a bare machine with a GPU do not have.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

_PARTIAL_PREFIX = ".partial-"
Kind = TypeVar("Kind")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _scratch(path: Path) -> Path:
    """A new name beside `path`."""
    return path.with_name(f"{_PARTIAL_PREFIX}{uuid.uuid4().hex}")


@contextmanager
def _as(path: Path, scratch: Path) -> Iterator[None]:
    """Errors speak of the final name."""
    try:
        yield
    except OSError as error:
        if str(scratch) not in str(error):
            raise
        raise OSError(str(error).replace(str(scratch), str(path))) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch name for a file that replaces `path`, durably and in one step, when the block ends well."""
    scratch = _scratch(path)
    try:
        with _as(path, scratch):
            yield scratch
            _sync(scratch)
            os.replace(scratch, path)
        _sync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong while it is written, such as a full disk."""
    try:
        yield
    except OSError as error:
        raise OSError(f"'{path}' cannot be written: {error}") from error


def write_file(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8)."""
    with writing(path), replacing(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a scratch directory that becomes `path`, which must not exist, when the block ends well.

    Every file is flushed to disk before the rename, so a crash at any moment leaves either no `path`
    or a complete one.
    """
    scratch = _scratch(path)
    scratch.mkdir()
    try:
        with _as(path, scratch):
            yield scratch
            for folder, _, names in os.walk(scratch, topdown=False):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            os.rename(scratch, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete `path` such that a crash half-way leaves nothing under its name."""
    doomed = _scratch(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_partial(parent: Path) -> None:
    """Delete what writers killed half-way left in `parent`; only where nobody else may be writing."""
    for leftover in parent.glob(f"{_PARTIAL_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, the same bytes for the same tensors.

    Neither durable nor atomic: give it a name from :func:`replacing` or :func:`new_directory`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with writing(path):
        path.touch()
        mode = path.stat().st_mode  # the library replaces the file by a private one
        try:
            save_file(contiguous, path, dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise OSError(error) from error
        path.chmod(mode)
        if metadata:
            _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """The library writes the metadata in an order that differs from run to run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(content) != size:
            raise OSError(f"the header of {size} bytes became {len(content)}")
        file.seek(8)
        file.write(content)


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Read a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is not a whole safetensors file: {error}") from error


def read_text(path: Path) -> str:
    """Read UTF-8 text; a byte order mark is no part of it."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 text: {error}") from error


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """Read a JSON file as what `kind`, a record or another annotation, says."""
    return parse_json(read_text(path), kind, f"'{path}'")


def parse_json(text: str, kind: type[Kind], source: str) -> Kind:
    """Like `read_json`, from a text; errors begin with `source`."""
    from pydantic import TypeAdapter, ValidationError

    from moduleformer_ext.records import complaint

    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        field, problem = complaint(error)
        raise ValueError(f"{source}: {field} {problem}" if field else f"{source}: {problem}") from error


def to_json(record: Any) -> str:
    """A record, or plain values, as the text of a JSON file."""
    from moduleformer_ext.records import Record

    return json.dumps(record.model_dump(mode="json") if isinstance(record, Record) else record, indent=2) + "\n"
