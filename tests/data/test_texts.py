"""Texts that wait on disk: what comes back is what went in, and tokens do not tell where it was cut."""

import gzip
import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from full_disk import Full
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from moduleformer_ext.data import (
    END_OF_TEXT,
    Document,
    build_dataset,
    encode_texts,
    load_tokenizer,
    stream,
    text_files,
    texts,
    tokenize,
    train_tokenizer,
)
from moduleformer_ext.data.texts import BYTE_LEVEL, PLACES, StoredText, TextStore, any_of
from moduleformer_ext.data.tokenizer import where_to_cut

_PARTS = ["word", " two", "\n", "\n\n", "\n ", "\r\n", "'s", "12", "(", ".", "\t", "日本", "é", "\u0301", "\u2028", " "]


def _text(seed: int, parts: int = 400) -> str:
    return "".join(random.Random(seed).choices(_PARTS, k=parts))


def test_a_tokenizer_that_cuts_and_fills_up_texts_is_ours_without_that(tmp_path: Path) -> None:
    text = _text(3)
    plain = train_tokenizer([text], 300)
    expected = encode_texts(plain, [text, "a"])
    for setting in ("truncation", "padding"):
        tokenizer = Tokenizer.from_str(plain.to_str())
        if setting == "truncation":
            tokenizer.enable_truncation(max_length=5)
        else:
            tokenizer.enable_padding(length=7)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert encode_texts(load_tokenizer(tmp_path), [text, "a"]) == expected
        with pytest.raises(ValueError, match=rf"^tokenizer: must have no {setting}, .* got .*length"):
            encode_texts(tokenizer, [text])


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


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_full_disk_is_named(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts.tempfile, "TemporaryFile", lambda dir: Full().buffered())
    store = TextStore(tmp_path)
    with pytest.raises(OSError, match=f"'{tmp_path}' cannot be written: .*No space left"):
        str(store.add(["a" * size]))


def _paragraphs(words: list[str], space: str, end: str, seed: int) -> str:
    """Five hundred lines of one to twelve words."""
    draw = random.Random(seed)
    lines = (space.join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(500))
    return "".join(f"{line}{end}" for line in lines)


# White space to some and not to others, what joins, and letters, digits and signs of several scripts.
_SIGNS = [
    chr(code) for code in (*range(1, 32), 0x7F, 0x85, 0xA0, 0x1680, 0x180E, *range(0x2000, 0x2010), 0x2029, 0x202F)
]
_SIGNS += [
    chr(code) for code in (0x205F, 0x2060, 0x3000, 0xFEFF, 0x3042, 0x3099, 0x30FB, 0x3002, 0xFF0C, 0x9FFF, 0x1F600)
]
_SIGNS += ["\n", " ", "a", "s", "'", "1", "\u2019", "字", "ж"] * 8
_ENGLISH = ["It", "isn't", "so", "(far)", "12,345.6", "—", "“quoted”", "'re", "end.", "e\u0301"]
_RUSSIAN = ["Это", "не", "«так»", "ли,", "ещё", "—", "да.", "1917"]
_CHINESE = ["这是", "一个", "句子。", "「引用」", "他说\uff0c", "2024年", "\uff01", "日本語です。"]
_CODE = ["if x:\n        return y", "def f(a, b):\n    pass", "#\n\n\n", "\tg[1] += 2", "    x = 1\n\n        y"]
KINDS = {
    "English": _paragraphs(_ENGLISH, " ", "\n", 0),
    "Russian": _paragraphs(_RUSSIAN, " ", "\n", 1),
    "Chinese": _paragraphs(_CHINESE, "", "\n", 2),
    "Chinese, indented": _paragraphs(_CHINESE, "", "\n\u3000\u3000", 3),
    "lines that end as on Windows": _paragraphs(_ENGLISH, " ", "\r\n", 4),
    "Chinese, likewise": _paragraphs(_CHINESE, "", "\r\n", 5),
    "blank lines": _paragraphs(_RUSSIAN, " ", "\n\n", 6),
    "Chinese, blank lines": _paragraphs(_CHINESE, "", "\n\n", 7),
    "blank lines, likewise": _paragraphs(_CHINESE, "", "\r\n\r\n", 8),
    "code": _paragraphs(_CODE, "\n    ", "\n  ", 9),
    "tabs": _paragraphs(_ENGLISH, "\t", "\n\t", 10),
    "one line": _paragraphs(_ENGLISH, " ", " ", 11),
    "one line of Chinese": _paragraphs(_CHINESE, "", "", 12),
    "anything": "".join(random.Random(13).choices(_PARTS + _SIGNS, k=4000)),
}
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama_3() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_LLAMA_3), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.fixture(
    scope="module", params=["GPT-2", "Llama 3", "NeoX", "prefix", "no byte level", "scripts", "NFKC", "digits"]
)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each of a kind that parts words by its own rules."""
    made = train_tokenizer(KINDS.values(), 600)
    if request.param == "Llama 3":
        made.pre_tokenizer = llama_3()
    elif request.param == "NeoX":
        made.add_tokens([AddedToken(" " * count, normalized=False) for count in range(2, 25)])
    elif request.param == "prefix":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif request.param == "no byte level":
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    elif request.param == "scripts":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.UnicodeScripts(), made.pre_tokenizer])
    elif request.param == "digits":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), made.pre_tokenizer])
    elif request.param == "NFKC":
        made.normalizer = normalizers.NFKC()
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_tell_where_a_text_was_cut(kind: str, tokenizer: Tokenizer) -> None:
    text, places = KINDS[kind], where_to_cut(tokenizer)
    assert places is not None
    [expected] = encode_texts(tokenizer, [text])
    for size in (1, 5, 64):
        pieces = list(StoredText.of(text).pieces(places, size))
        assert "".join(pieces) == text
        assert [token for piece in encode_texts(tokenizer, pieces) for token in piece] == expected


PLACES_OF = {"GPT-2": BYTE_LEVEL, "Llama 3": any_of(list(PLACES)[1:])}


@pytest.mark.parametrize("size", [1, 64, 1000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", PLACES_OF)
def test_pieces_have_a_bound(of: str, kind: str, size: int) -> None:
    sizes = [len(piece.encode()) for piece in StoredText.of(KINDS[kind]).pieces(PLACES_OF[of], size)]
    assert min(sizes[:-1]) >= size
    assert max(sizes) < size + 250


def test_the_places_of_known_tokenizers() -> None:
    tokenizer = train_tokenizer(KINDS.values(), 300)
    assert where_to_cut(tokenizer) == PLACES_OF["GPT-2"]
    tokenizer.pre_tokenizer = llama_3()
    assert where_to_cut(tokenizer) == PLACES_OF["Llama 3"]


def test_a_line_without_any_place_is_one_piece() -> None:
    assert len(list(StoredText.of("x" * 10**6).pieces())) == 1
    assert list(StoredText.of("").pieces()) == [""]


def test_documents_are_tokenised_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [_text(seed) for seed in range(20)]
    tokenizer = train_tokenizer(texts, 320)
    documents = [Document("d", str(number), text) for number, text in enumerate(texts)]
    monkeypatch.setattr(stream, "PIECE", 5)
    monkeypatch.setattr(stream, "_BATCH", 100)
    given: list[list[str]] = []

    def encode(tokenizer: Tokenizer, batch: list[str]) -> list[list[int]]:
        given.append(batch)
        return encode_texts(tokenizer, batch)

    monkeypatch.setattr(stream, "encode_texts", encode)
    tokens = tokenize([*documents, Document("d", "empty", "")], tokenizer)
    assert tokens.tokens.tolist() == [0, *(token for ids in encode_texts(tokenizer, texts) for token in (*ids, 0)), 0]
    assert tokens.num_bytes == sum(len(text.encode()) for text in texts)
    sizes = [sum(len(text.encode()) for text in batch) for batch in given]
    assert all(100 <= size < 150 for size in sizes[:-1])


def test_a_tokenizer_whose_words_go_beyond_a_line_gets_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(["some text"], 257)
    tokenizer.normalizer = normalizers.Prepend("▁")
    assert where_to_cut(tokenizer) is None
    tokenizer = train_tokenizer(["some text"], 257)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")  # words go on over lines
    assert list(StoredText.of("a\nb c\nd").pieces(where_to_cut(tokenizer), 1)) == ["a\nb", " c\nd"]

    text = "one\ntwo\nthree\n"
    vocab = {token: number for number, token in enumerate([END_OF_TEXT, *sorted(set(text)), "e\n", "e\nt"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("e", "\n"), ("e\n", "t")]))
    tokenizer.decoder = decoders.Fuse()
    assert where_to_cut(tokenizer) is None
    monkeypatch.setattr(stream, "PIECE", 2)
    ids = tokenize([Document("d", "n", text)], tokenizer).tokens[1:-1]
    assert vocab["e\nt"] in ids.tolist()
    assert tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize("entry", ["foo\nbar", "a b", "\n\n", "x\r\n"])
def test_entries_that_are_found_before_words_stay_whole(entry: str) -> None:
    tokenizer = train_tokenizer(KINDS.values(), 300)
    tokenizer.add_tokens([AddedToken(entry, normalized=False)])
    text = f"1 {entry} two{entry}three {entry}\n{entry} 4" * 20
    pieces = list(StoredText.of(text).pieces(where_to_cut(tokenizer), 1))
    assert [token for ids in encode_texts(tokenizer, pieces) for token in ids] == encode_texts(tokenizer, [text])[0]


@pytest.mark.parametrize("sides", [{"lstrip": True}, {"rstrip": True}])
def test_entries_that_take_white_space_with_them(sides: dict[str, bool]) -> None:
    tokenizer = train_tokenizer(KINDS.values(), 300)
    tokenizer.add_tokens([AddedToken("<x>", normalized=False, **sides)])
    text = "one\n<x>\ntwo <x> three\n\n<x>\n\nfour\n" * 20
    pieces = list(StoredText.of(text).pieces(where_to_cut(tokenizer), 1))
    assert [token for ids in encode_texts(tokenizer, pieces) for token in ids] == encode_texts(tokenizer, [text])[0]


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
        pieces = sum(1 for document in documents for _ in document.text.pieces())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(len(document.text) for document in documents) > 3 * size
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
