"""The texts in a file: plain text, JSON lines, Parquet or Arrow, compressed or not. The content says which."""

import bz2
import codecs
import gzip
import importlib
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedReader, RawIOBase
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from moduleformer_ext.data.texts import StoredText, TextStore
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
_OPEN: Final[dict[str, Callable[[BinaryIO], Any]]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_CHUNK: Final = 1 << 20
"""Bytes that are read at a time."""
_ROWS: Final = 1024
"""Of Parquet that are read at a time."""
_Result = TypeVar("_Result")


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


def read_texts(
    path: Path, store: TextStore, field: str = FIELD, *, named: bool = False
) -> Iterator[tuple[str, StoredText]]:
    """The texts of a file that are not blank, moved piece by piece to a store, each with what tells it from others of
    the file: nothing for plain text, `#3` for the fourth record.

    Args:
        store: where the texts go.
        field: of the records of JSON lines, Parquet and Arrow.
        named: the file was asked for, and not only found in a folder: archives are errors rather than left out.

    Raises:
        ValueError: the file is damaged, or records have no such field; the message names file and line.
        ImportError: a package is missing; the message says which.
    """
    packings: list[str] = []
    suffixes = path.suffixes
    while (kind := _kind(_first(path, packings, lambda stream: stream.read(_HEAD)))) in _COMPRESSED:
        _check_suffix(path, suffixes, kind)
        packings.append(kind)
        suffixes = suffixes[:-1]
    if kind and kind not in _TABLES:
        if named:
            raise ValueError(f"text: '{path}' is a {kind}; unpack or convert it to text first")
        return
    if not (start := _first(path, packings, _not_blank)):
        return
    _check_suffix(path, suffixes, kind)
    is_lines = bool(suffixes) and suffixes[-1].lower() in _LINES_SUFFIXES
    if not (kind or is_lines) and start.startswith(b"{"):
        is_lines = _first(path, packings, lambda stream: _looks_like_lines(stream, field))
    with _opened(path, packings) as stream:
        if kind or is_lines:
            records = _column(path, kind, stream, store, field) if kind else _lines(path, stream, field)
            for number, record in enumerate(records):
                if (text := store.add([record])) is not None:
                    yield f"#{number}", text
            return
        try:
            text = store.add(_decoded(stream))
        except (_NotTextError, UnicodeDecodeError):
            return
        if text is not None:
            yield "", text


class _NotTextError(Exception):
    """What looked like text has a zero byte."""


def _decoded(stream: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    while chunk := stream.read(_CHUNK):
        if b"\0" in chunk:
            raise _NotTextError
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _not_blank(stream: BinaryIO) -> bytes:
    """What the first bytes that are not blank begin with."""
    return next((start for chunk in iter(lambda: stream.read(_CHUNK), b"") if (start := chunk.lstrip())), b"")


def _first(path: Path, packings: Sequence[str], look: Callable[[BinaryIO], _Result]) -> _Result:
    """What a look at the beginning of a file says."""
    with _opened(path, packings) as stream:
        return look(stream)


@contextmanager
def _opened(path: Path, packings: Sequence[str]) -> Iterator[BinaryIO]:
    """A file as it is read after unpacking it, the outermost packing first."""
    with ExitStack() as stack:
        stream: BinaryIO = stack.enter_context(path.open("rb"))
        for kind in packings:
            with _whole(path, kind):
                unpacked = stack.enter_context(_unpacker(path, kind, stream))
            stream = stack.enter_context(BufferedReader(_Unpacked(path, kind, unpacked), _CHUNK))
        yield stream


class _Unpacked(RawIOBase):
    """What a damaged file says while it is unpacked, with its name."""

    def __init__(self, path: Path, kind: str, unpacked: BinaryIO) -> None:
        self._path, self._kind, self._unpacked = path, kind, unpacked

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _whole(self._path, self._kind):
            content = self._unpacked.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


@contextmanager
def _whole(path: Path, kind: str) -> Iterator[None]:
    """Errors of what reads a kind of file are about one that is damaged."""
    try:
        yield
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:  # pyarrow's own are among them
        raise ValueError(f"text: '{path}' is not a whole {kind} file: {error}") from error


def _kind(head: bytes) -> str:
    """What a file that begins so is; empty for text and what is not known."""
    return next((kind for mark, kind in _MARKS.items() if re.match(mark, head)), "")


def _check_suffix(path: Path, suffixes: list[str], kind: str) -> None:
    """A file that is not what its name says is damaged, or not whole."""
    said = _SUFFIXES.get(suffixes[-1].lower() if suffixes else "")
    if said not in (None, kind):
        raise ValueError(f"text: '{path}' must be {said}, as its name says, got {kind or 'something else'}")


def _unpacker(path: Path, kind: str, stream: BinaryIO) -> Any:
    if kind in _OPEN:
        return _OPEN[kind](stream)
    if kind == "zstd" and sys.version_info >= (3, 14):
        return importlib.import_module("compression.zstd").open(stream)
    return _pyarrow(path, kind).CompressedInputStream(stream, kind)


def _pyarrow(path: Path, kind: str) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ImportError(
            f"text: '{path}' is {kind}, which pyarrow reads; install it with: pip install 'moduleformer_ext[data]'"
        ) from error


def _looks_like_lines(stream: BinaryIO, field: str) -> bool:
    """Whether the first two lines are JSON objects, or a single line is one that has the field."""
    lines = list(islice((line for line in islice(stream, 64) if line.strip()), 2))
    if not all(line.strip().startswith(b"{") and line.strip().endswith(b"}") for line in lines):
        return False
    try:
        records = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return False
    return len(records) == 2 or (len(records) == 1 and field in records[0])


def _lines(path: Path, stream: BinaryIO, field: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
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


def _column(path: Path, kind: str, stream: BinaryIO, store: TextStore, field: str) -> Iterator[str]:
    pyarrow = _pyarrow(path, kind)
    with ExitStack() as stack:
        if not stream.seekable():  # tables begin at their end
            stream = stack.enter_context(store.copied(stream))
        with _whole(path, kind):
            schema, batches = _open_table(pyarrow, kind, stream)
        if field not in schema.names:
            raise ValueError(f"text: '{path}' {_lacks(field, ', '.join(schema.names))}")
        kinds, column = pyarrow.types, schema.field(field).type
        inner = column.value_type if kinds.is_dictionary(column) else column
        if not (kinds.is_string(inner) or kinds.is_large_string(inner) or kinds.is_string_view(inner)):
            raise ValueError(f"text: '{path}' must have text in field '{field}', got {column}")
        source = iter(batches(field))
        while True:
            with _whole(path, kind):
                batch = next(source, None)
            if batch is None:
                return
            yield from (text or "" for text in batch.column(field).to_pylist())


def _open_table(pyarrow: Any, kind: str, stream: BinaryIO) -> tuple[Any, Callable[[str], Iterator[Any]]]:
    """The schema, and what gives the batches with a column."""
    stream.seek(0)
    if kind == "Parquet":
        file = importlib.import_module("pyarrow.parquet").ParquetFile(stream)
        return file.schema_arrow, lambda field: file.iter_batches(batch_size=_ROWS, columns=[field])
    head = stream.read(_HEAD)
    stream.seek(0)
    if head.startswith(b"ARROW1"):
        reader = pyarrow.ipc.open_file(stream)
        return reader.schema, lambda _: map(reader.get_batch, range(reader.num_record_batches))
    table = pyarrow.ipc.open_stream(stream)
    return table.schema, lambda _: iter(table)
