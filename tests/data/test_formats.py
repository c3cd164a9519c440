"""Every kind of file that texts may be in: whole, damaged, and not what it is called."""

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from full_disk import Full

from moduleformer_ext.data import formats, text_files, texts
from moduleformer_ext.data.formats import check_packages, stem
from moduleformer_ext.data.texts import TextStore

TEXTS = ["naïve one", "two\nlines", "日本"]
LINES = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)).encode()
RECORDS = [("#0", TEXTS[0]), ("#1", TEXTS[1]), ("#2", TEXTS[2])]


def read_texts(path: Path, field: str = "text") -> list[tuple[str, str]]:
    return [(part, str(text)) for part, text in formats.read_texts(path, TextStore(), field)]


def _pyarrow_packed(codec: str) -> Callable[[bytes], bytes]:
    def pack(content: bytes) -> bytes:
        pyarrow = pytest.importorskip("pyarrow")
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, codec) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()

    return pack


PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _pyarrow_packed("zstd"),
    ".lz4": _pyarrow_packed("lz4"),
}


def _table(kind: str, texts: list[str | None], name: str = "text") -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": range(len(texts)), name: texts})
    sink = pyarrow.BufferOutputStream()
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(table, sink, row_group_size=2)
    else:
        new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_texts_and_records(suffix: str, tmp_path: Path) -> None:
    text, lines = tmp_path / f"a.txt{suffix}", tmp_path / f"a.jsonl{suffix}"
    text.write_bytes(PACKERS[suffix](TEXTS[1].encode()))
    lines.write_bytes(PACKERS[suffix](LINES))
    twice = tmp_path / f"a.txt.gz{suffix}"
    twice.write_bytes(PACKERS[suffix](gzip.compress(b"deep")))
    assert read_texts(text) == [("", TEXTS[1])]
    assert read_texts(lines) == RECORDS
    assert read_texts(twice) == [("", "deep")]
    assert stem(lines) == stem(text) == "a"
    # what is compressed is so under any name, and a compressed file that was cut off is an error
    plain = tmp_path / "plain.txt"
    plain.write_bytes(PACKERS[suffix](b"one two three"))
    assert read_texts(plain) == [("", "one two three")]
    lines.write_bytes(PACKERS[suffix](LINES)[:-20])
    with pytest.raises(ValueError, match=rf"a\.jsonl{suffix}' is not a whole"):
        read_texts(lines)
    lines.write_bytes(b"not packed")
    with pytest.raises(ValueError, match="as its name says, got something else"):
        read_texts(lines)


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_tables(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    path.write_bytes(_table(kind, [TEXTS[0], None, " ", *TEXTS[1:]], "body"))
    assert read_texts(path, "body") == [("#0", TEXTS[0]), ("#3", TEXTS[1]), ("#4", TEXTS[2])]
    with pytest.raises(ValueError, match=r"the field 'text', got id, body; name one with --text-field"):
        read_texts(path)
    with pytest.raises(ValueError, match="must have text in field 'id', got int64"):
        read_texts(path, "id")
    whole = path.read_bytes()
    unnamed = tmp_path / "no-suffix"
    unnamed.write_bytes(whole)
    assert len(read_texts(unnamed, "body")) == 3
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.(parquet|arrow)' is not a whole"):
        read_texts(path, "body")


@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_compressed_tables_are_unpacked_beside_the_texts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(_table(kind, ["text" * 20] * 1000))
    (tmp_path / "a.gz").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    folders: list[Path] = []
    make = texts.tempfile.TemporaryFile

    def made(dir: Path) -> object:
        folders.append(dir)
        return make(dir=dir)

    monkeypatch.setattr(texts.tempfile, "TemporaryFile", made)
    assert [len(text_files([str(tmp_path / "a")], scratch=tmp_path)), folders] == [1, [tmp_path]]  # that of the texts
    assert [len(text_files([str(tmp_path / "a.gz")], scratch=tmp_path)), folders] == [1, [tmp_path] * 3]

    store = TextStore(tmp_path)
    monkeypatch.setattr(texts.tempfile, "TemporaryFile", lambda dir: Full().buffered())
    with pytest.raises(OSError, match=f"^'{tmp_path}' cannot be written: .*No space left"):
        list(formats.read_texts(tmp_path / "a.gz", store))


def test_dictionary_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert [text for _, text in read_texts(tmp_path / "a.arrow")] == ["a", "b", "a"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.txt", "a", "a.json"])
def test_json_lines_are_read_as_such_whatever_their_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\n" + LINES.replace(b"\n", b"\r\n"))
    assert read_texts(path) == RECORDS
    with pytest.raises(ValueError, match=r"line 2 of .*the field 'body', got id, text"):
        read_texts(path, "body")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 4 of .* is not JSON"),
        (b"[1]", "must be a record with the field 'text', got none"),
        (b'{"text": 3}', "must have text in field 'text', got int"),
        (b'{"text": "\\ud800"}', "got half a character"),
        (b'{"text": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_damaged_lines(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + line)
    with pytest.raises(ValueError, match=message):
        read_texts(path)


def test_json_that_is_one_value_stays_text(tmp_path: Path) -> None:
    for name, content in (
        ("a.json", '{"name": "x"}\n'),
        ("b.json", '{\n  "text": "x"\n}\n'),
        ("c.txt", "{} and {}\n{}"),
    ):
        (tmp_path / name).write_text(content)
        assert read_texts(tmp_path / name) == [("", content)]
    (tmp_path / "d").write_text('{"text": "one record"}')
    assert read_texts(tmp_path / "d") == [("#0", "one record")]


def _archive(kind: str) -> bytes:
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w") as archive:
            archive.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=sink, mode=kind) as archive:
            archive.addfile(tarfile.TarInfo("a.txt"))
    return sink.getvalue()


@pytest.mark.parametrize(("kind", "said"), [("zip", "zip archive"), ("w:", "tar archive"), ("w:gz", "tar archive")])
def test_archives_are_refused_by_name_and_left_out_of_folders(kind: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(_archive(kind))
    with pytest.raises(ValueError, match=f"archive' is a {said}; unpack"):
        text_files([str(path)])
    (tmp_path / "a.txt").write_text("kept")
    assert [str(document.text) for document in text_files([f"d={tmp_path}"])] == ["kept"]


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS, "id": [0, 1, 2]})
    data.select([2, 0]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "two")
    assert [str(d.text) for d in text_files([str(tmp_path / "one")])] == [TEXTS[2], TEXTS[0]]
    found = text_files([str(tmp_path / "two")])
    assert [(d.domain, d.name.split("/")[0], str(d.text)) for d in found] == [
        ("two", "test", TEXTS[1]),
        ("two", "train", TEXTS[0]),
        ("two", "train", TEXTS[2]),
    ]
    (shard,) = (tmp_path / "one").glob("*.arrow")
    shard.unlink()
    with pytest.raises(ValueError, match=rf"is not whole; it lacks {shard.name}"):
        text_files([str(tmp_path / "one")])
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [3]}')
    with pytest.raises(ValueError, match="does not list the files of a dataset"):
        text_files([str(tmp_path / "one")])


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1....PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for read in (check_packages, lambda path: read_texts(path)):
        with pytest.raises(ImportError, match=r"a\.parquet' is Parquet.*pip install 'moduleformer_ext\[data\]'"):
            read(path)


def test_texts_that_begin_like_something_else(tmp_path: Path) -> None:
    for content in ("BZh is how bzip2 begins", "PK is a name", "(µ/ý", "# %PDF-1.4"):
        (tmp_path / "a.txt").write_text(content)
        assert read_texts(tmp_path / "a.txt") == [("", content)]


def test_blank_lines_before_a_text(tmp_path: Path) -> None:
    path = tmp_path / "late.txt"
    path.write_text("\n" * 70 + "prose\n")
    assert [text.strip() for _, text in read_texts(path)] == ["prose"]
