"""The texts in a file: plain text, JSON lines, Parquet or Arrow, compressed or not. The content says which."""

import bz2
import gzip
import importlib
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from moduleformer_ext.files import read_json

FIELD: Final = "text"
"""Of a record, unless another is named."""

_MARKS: Final = {
    rb"\x1f\x8b": "gzip",
    rb"BZh[1-9]1AY&SY": "bzip2",
    rb"\xfd7zXZ\0": "xz",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"\x04\x22\x4d\x18": "lz4",
    rb"PAR1": "Parquet",
    rb"ARROW1\0\0|\xff\xff\xff\xff": "Arrow",
    rb"PK\x03\x04": "zip archive",
    rb"7z\xbc\xaf": "7z archive",
    rb"Rar!\x1a\x07": "RAR archive",
    rb"%PDF-": "PDF",
    rb"(?s).{257}ustar": "tar archive",
}
"""What files begin with."""
_HEAD: Final = 262
"""Bytes to look at for it."""
_COMPRESSED: Final = ("gzip", "bzip2", "xz", "zstd", "lz4")
_TABLES: Final = ("Parquet", "Arrow")
_LINES_SUFFIXES: Final = (".jsonl", ".ndjson", ".jsonlines")
_SUFFIXES: Final = {
    ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4", ".parquet": "Parquet", ".arrow": "Arrow"
}  # fmt: skip
_UNPACK: Final[dict[str, Callable[[bytes], bytes]]] = {
    "gzip": gzip.decompress,
    "bzip2": bz2.decompress,
    "xz": lzma.decompress,
}


def stem(path: Path) -> str:
    """The name without the suffixes of compression and format: `a` of `a.jsonl.gz`."""
    inner = Path(path.name.removesuffix(path.suffix)) if _SUFFIXES.get(path.suffix.lower()) in _COMPRESSED else path
    return inner.stem


def dataset_files(folder: Path) -> list[str] | None:
    """The names of the data in a folder that Hugging Face's datasets library wrote; None for any other folder.

    Raises:
        ValueError: some of the data is missing, or its list is damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        return []  # the splits are folders of their own
    if not (folder / "dataset_info.json").is_file():
        return None
    state = folder / "state.json"
    if not state.is_file():  # in the library's cache
        return sorted(path.name for path in folder.glob("*.arrow")) or None
    files = read_json(state, dict[str, Any]).get("_data_files")
    try:
        names = [str(file["filename"]) for file in files or ()]
    except (TypeError, KeyError) as error:
        raise ValueError(f"text: '{state}' does not list the files of a dataset") from error
    if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise ValueError(f"text: the dataset in '{folder}' is not whole; it lacks {', '.join(missing)}")
    return names


def check_packages(path: Path) -> None:
    """Raise an ImportError that says what to install if something is needed to read the file."""
    with path.open("rb") as file:
        kind = _kind(file.read(_HEAD))
    if kind in ("zstd", "lz4", "Parquet", "Arrow") and not (kind == "zstd" and sys.version_info >= (3, 14)):
        _pyarrow(path, kind)


def read_texts(path: Path, field: str = FIELD, *, named: bool = False) -> Iterator[tuple[str, str]]:
    """The texts of a file that are not blank, each with what tells it from others of the file: nothing for plain text,
    `#3` for the fourth record.

    Args:
        field: of the records of JSON lines, Parquet and Arrow.
        named: the file was asked for, and not only found in a folder: archives are errors rather than left out.

    Raises:
        ValueError: the file is damaged, or records have no such field; the message names file and line.
        ImportError: a package is missing; the message says which.
    """
    content = path.read_bytes()
    suffixes = path.suffixes
    while (kind := _kind(content)) in _COMPRESSED:
        _check_suffix(path, suffixes, kind)
        content = _unpack(path, kind, content)
        suffixes = suffixes[:-1]
    if kind and kind not in _TABLES:
        if named:
            raise ValueError(f"text: '{path}' is a {kind}; unpack or convert it to text first")
        return
    if not content.strip():
        return
    _check_suffix(path, suffixes, kind)
    if kind:
        yield from _numbered(_column(path, kind, content, field))
    elif (suffixes and suffixes[-1].lower() in _LINES_SUFFIXES) or _looks_like_lines(content, field):
        yield from _numbered(_lines(path, content, field))
    elif b"\0" not in content:
        try:
            yield "", content.decode()
        except UnicodeDecodeError:
            return


def _kind(head: bytes) -> str:
    """What a file that begins so is; empty for text and what is not known."""
    return next((kind for mark, kind in _MARKS.items() if re.match(mark, head)), "")


def _check_suffix(path: Path, suffixes: list[str], kind: str) -> None:
    """A file that is not what its name says is damaged, or not whole."""
    said = _SUFFIXES.get(suffixes[-1].lower() if suffixes else "")
    if said not in (None, kind):
        raise ValueError(f"text: '{path}' must be {said}, as its name says, got {kind or 'something else'}")


def _unpack(path: Path, kind: str, content: bytes) -> bytes:
    try:
        if kind in _UNPACK:
            return _UNPACK[kind](content)
        if kind == "zstd" and sys.version_info >= (3, 14):
            return bytes(importlib.import_module("compression.zstd").decompress(content))
        pyarrow = _pyarrow(path, kind)
        with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), kind) as stream:
            return bytes(stream.read())
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"text: '{path}' is not a whole {kind} file: {error}") from error


def _pyarrow(path: Path, kind: str) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ImportError(
            f"text: '{path}' is {kind}, which pyarrow reads; install it with: pip install 'moduleformer_ext[data]'"
        ) from error


def _numbered(texts: Iterator[str]) -> Iterator[tuple[str, str]]:
    return ((f"#{number}", text) for number, text in enumerate(texts) if text.strip())


def _looks_like_lines(content: bytes, field: str) -> bool:
    """Whether the first two lines are JSON objects, or a single line is one that has the field."""
    lines = content.split(b"\n", 64)[:64]
    lines = [line for line in lines if line.strip()][:2]
    if not all(line.strip().startswith(b"{") and line.strip().endswith(b"}") for line in lines):
        return False
    try:
        records = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return False
    return len(records) == 2 or (len(records) == 1 and field in records[0])


def _lines(path: Path, content: bytes, field: str) -> Iterator[str]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"text: line {number} of '{path}' is not JSON: {error}") from error
        if not isinstance(record, dict) or field not in record:
            fields = ", ".join(record) if isinstance(record, dict) else ""
            raise ValueError(f"text: line {number} of '{path}' {_lacks(field, fields)}")
        text = "" if record[field] is None else record[field]
        if not isinstance(text, str):
            raise ValueError(
                f"text: line {number} of '{path}' must have text in field '{field}', got {type(text).__name__}"
            )
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"text: line {number} of '{path}' must have text in field '{field}', got half a character")
        yield text


def _lacks(field: str, fields: str) -> str:
    return f"must be a record with the field '{field}', got {fields or 'none'}; name one with --text-field"


def _column(path: Path, kind: str, content: bytes, field: str) -> Iterator[str]:
    pyarrow = _pyarrow(path, kind)
    try:
        schema, batches = _open_table(pyarrow, kind, content)
    except (OSError, ValueError) as error:  # pyarrow's own are one of the two
        raise ValueError(f"text: '{path}' is not a whole {kind} file: {error}") from error
    if field not in schema.names:
        raise ValueError(f"text: '{path}' {_lacks(field, ', '.join(schema.names))}")
    kinds, column = pyarrow.types, schema.field(field).type
    inner = column.value_type if kinds.is_dictionary(column) else column
    if not (kinds.is_string(inner) or kinds.is_large_string(inner) or kinds.is_string_view(inner)):
        raise ValueError(f"text: '{path}' must have text in field '{field}', got {column}")
    try:
        for batch in batches(field):
            yield from (text or "" for text in batch.column(field).to_pylist())
    except (OSError, ValueError) as error:
        raise ValueError(f"text: '{path}' is not a whole {kind} file: {error}") from error


def _open_table(pyarrow: Any, kind: str, content: bytes) -> tuple[Any, Callable[[str], Iterator[Any]]]:
    """The schema, and what gives the batches with a column."""
    buffer = pyarrow.BufferReader(content)
    if kind == "Parquet":
        file = importlib.import_module("pyarrow.parquet").ParquetFile(buffer)
        return file.schema_arrow, lambda field: file.iter_batches(columns=[field])
    if content.startswith(b"ARROW1"):
        reader = pyarrow.ipc.open_file(buffer)
        return reader.schema, lambda _: map(reader.get_batch, range(reader.num_record_batches))
    stream = pyarrow.ipc.open_stream(buffer)
    return stream.schema, lambda _: iter(stream)
