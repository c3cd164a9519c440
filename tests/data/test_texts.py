"""Texts that wait on disk: what comes back is what went in, and tokens do not tell where it was cut."""

import errno
import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from moduleformer_ext.data import (
    END_OF_TEXT,
    Document,
    build_dataset,
    encode_texts,
    stream,
    text_files,
    texts,
    tokenize,
    train_tokenizer,
)
from moduleformer_ext.data.texts import StoredText, TextStore
from moduleformer_ext.data.tokenizer import parts_lines

_PARTS = ["word", " two", "\n", "\n\n", "\n ", "\r\n", "'s", "12", "(", ".", "\t", "日本", "é", "\u0301", "\u2028", " "]


def _text(seed: int, parts: int = 400) -> str:
    return "".join(random.Random(seed).choices(_PARTS, k=parts))


def test_texts_come_back_from_the_store() -> None:
    store = TextStore()
    texts = [_text(seed) for seed in range(5)]
    stored = []
    for text in texts:
        kept = store.add(text[i : i + 7] for i in range(0, len(text), 7))
        assert kept is not None
        stored.append(kept)
        assert store.add([" \n", "\u2003"]) is None  # blank
    assert [str(text) for text in stored] == texts
    assert [len(text) for text in stored] == [len(text.encode()) for text in texts]
    assert [text.digest() for text in stored] == [StoredText.of(text).digest() for text in texts]
    assert len({text.digest() for text in stored}) == 5


def test_a_text_that_ends_in_an_error_leaves_nothing() -> None:
    def broken() -> Iterator[str]:
        yield "begun"
        raise OSError("disk full")

    store = TextStore()
    with pytest.raises(OSError, match="disk full"):
        store.add(broken())
    kept = store.add(["whole"])
    assert kept is not None
    assert (kept.start, str(kept)) == (0, "whole")


class Full(io.RawIOBase):
    """A file on a disk without room."""

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset

    def truncate(self, size: int | None = None) -> int:
        return 0

    def write(self, content: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_full_disk_is_named(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts.tempfile, "TemporaryFile", lambda dir: io.BufferedWriter(Full()))
    store = TextStore(tmp_path)
    with pytest.raises(OSError, match=f"'{tmp_path}' cannot be written: .*No space left"):
        str(store.add(["a" * size]))


@pytest.mark.parametrize("size", [1, 5, 64, 10**9])
def test_pieces_are_the_text(size: int) -> None:
    for seed in range(20):
        text = _text(seed)
        pieces = list(StoredText.of(text).pieces(size))
        assert "".join(pieces) == text
        assert all(len(piece.encode()) >= size for piece in pieces[:-1])
    assert list(StoredText.of("").pieces(size)) == [""]


@pytest.mark.parametrize("size", [1, 5, 64])
def test_tokens_do_not_tell_where_a_text_was_cut(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [_text(seed) for seed in range(20)]
    tokenizer = train_tokenizer(texts, 320)
    assert parts_lines(tokenizer)
    expected = encode_texts(tokenizer, texts)
    for text, ids in zip(texts, expected, strict=True):
        pieces = list(StoredText.of(text).pieces(size))
        assert len(pieces) > 1
        assert [token for piece in encode_texts(tokenizer, pieces) for token in piece] == ids
    documents = [Document("d", str(number), text) for number, text in enumerate(texts)]
    monkeypatch.setattr(stream, "PIECE", size)
    monkeypatch.setattr(stream, "_BATCH", 100)
    tokens = tokenize([*documents, Document("d", "empty", "")], tokenizer)
    assert tokens.tokens.tolist() == [0, *(token for ids in expected for token in (*ids, 0)), 0]
    assert tokens.num_bytes == sum(len(text.encode()) for text in texts)


def test_a_tokenizer_whose_words_go_beyond_a_line_gets_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(["some text"], 257)
    tokenizer.normalizer = normalizers.Prepend("▁")
    assert not parts_lines(tokenizer)
    for words in (pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Metaspace(prepend_scheme="never")):
        tokenizer = train_tokenizer(["some text"], 257)
        assert parts_lines(tokenizer)
        tokenizer.pre_tokenizer = words
        assert not parts_lines(tokenizer)

    text = "one\ntwo\nthree\n"
    vocab = {token: number for number, token in enumerate([END_OF_TEXT, *sorted(set(text)), "e\n", "e\nt"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("e", "\n"), ("e\n", "t")]))
    tokenizer.decoder = decoders.Fuse()
    monkeypatch.setattr(stream, "PIECE", 2)
    ids = tokenize([Document("d", "n", text)], tokenizer).tokens[1:-1]
    assert vocab["e\nt"] in ids.tolist()
    assert tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize("text", ["é" * 50, "日本" * 30, "a b" * 40, "x\n" * 40])
def test_cuts_keep_characters_whole(text: str) -> None:
    for percent in range(1, 100):
        first, second = StoredText.of(text).cut(percent / 100)
        assert str(first) + str(second) == text
        assert abs(len(first) - len(first.store) * percent / 100) <= 4


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    size = 32 << 20
    line = "a line of text, 32 bytes of it.\n"
    plain = line * (size // len(line))
    (tmp_path / "a.txt").write_text(plain)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(f"b{plain}".encode(), 1))
    records = (json.dumps({"text": f"{number} {line * 32}"}) + "\n" for number in range(size >> 10))
    (tmp_path / "c.jsonl").write_text("".join(records))
    del plain, records
    tracemalloc.start()
    try:
        documents = text_files([str(tmp_path / name) for name in ("a.txt", "b.txt.gz", "c.jsonl")])
        pieces = sum(1 for document in documents for _ in document.stored.pieces())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(len(document.stored) for document in documents) > 3 * size
    assert pieces > 2 * (size >> 19)
    assert peak < size


def test_the_scratch_file_has_no_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n" * 20)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    documents = text_files([str(tmp_path / "a.txt")], scratch=scratch)
    assert not list(scratch.iterdir())
    dataset = build_dataset(tmp_path / "data", documents, vocab_size=260, held_out_fraction=0.2)
    decoded = [dataset.tokenizer.decode(side["a"].tokens[1:-1].tolist()) for side in (dataset.train, dataset.held_out)]
    assert "".join(decoded) == "one\ntwo\nthree\n" * 20
