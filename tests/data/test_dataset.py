import itertools
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from moduleformer_ext.data import (
    END_OF_TEXT,
    Document,
    build_dataset,
    end_of_text_id,
    open_dataset,
    split_documents,
    tokenize,
    train_tokenizer,
)
from moduleformer_ext.data.tokenizer import _interruptible

DOCUMENTS = [
    Document(
        domain,
        f"{domain}-{index}",
        f"{domain} number {index}: naïve café — 日本語 {END_OF_TEXT} \t\r\n  end" * 3,
    )
    for domain in ("left", "right")
    for index in range(40)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer((str(document.text) for document in DOCUMENTS), 300)


def test_stream_decodes_to_the_text(tokenizer: Tokenizer) -> None:
    stream = tokenize(DOCUMENTS, tokenizer)
    end = end_of_text_id(tokenizer)
    ends = np.flatnonzero(stream.tokens == end)
    assert len(ends) == len(DOCUMENTS) + 1  # the look-alike in the text is plain bytes
    texts = [
        tokenizer.decode(stream.tokens[start + 1 : stop].tolist(), skip_special_tokens=False)
        for start, stop in itertools.pairwise(ends)
    ]
    assert texts == [str(document.text) for document in DOCUMENTS]
    assert stream.num_bytes == sum(len(text.encode()) for text in texts)
    assert stream.num_scored == len(stream.tokens) - 1


def test_unseen_bytes_survive(tokenizer: Tokenizer) -> None:
    text = "".join(chr(code) for code in range(0x20, 0x2000)) + "\x00\x7f\U0001f600"
    ids = tokenize([Document("d", "n", text)], tokenizer).tokens[1:-1]
    assert tokenizer.decode(ids.tolist()) == text


def test_build_and_open(tmp_path: Path) -> None:
    built = build_dataset(tmp_path / "data", DOCUMENTS, vocab_size=280, held_out_fraction=0.2)
    opened = open_dataset(tmp_path / "data")
    assert opened.domains == ["left", "right"]
    assert opened.tokenizer.to_str() == built.tokenizer.to_str()
    assert isinstance(opened.train["left"].tokens, np.memmap)
    split = split_documents(DOCUMENTS, 0.2)
    for side, members in ((opened.train, split.train), (opened.held_out, split.held_out)):
        for domain, stream in side.items():
            expected = tokenize([m for m in members if m.domain == domain], opened.tokenizer)
            assert np.array_equal(stream.tokens, expected.tokens)
            assert (stream.num_bytes, stream.num_documents) == (expected.num_bytes, expected.num_documents)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]  # no scratch left


def test_tokenizer_is_trained_on_the_training_split_only(tmp_path: Path) -> None:
    dataset = build_dataset(tmp_path / "data", DOCUMENTS, vocab_size=300, held_out_fraction=0.2)
    texts = (str(document.text) for document in split_documents(DOCUMENTS, 0.2).train)
    assert dataset.tokenizer.to_str() == train_tokenizer(texts, 300).to_str()


def test_wrong_inputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 257 entries, got 100"):
        build_dataset(tmp_path / "data", DOCUMENTS, vocab_size=100, held_out_fraction=0.2)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="holds no tokenised corpus"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="separates documents"):
        end_of_text_id(Tokenizer(models.BPE()))


@pytest.mark.parametrize("unit", ["a", " ", "\n", "_-", "é"])
def test_runs_of_one_kind_take_no_time(unit: str) -> None:
    """A word of a million characters would take minutes."""
    start = time.monotonic()
    tokenizer = train_tokenizer([unit * (500_000 // len(unit))], 2048)
    assert time.monotonic() - start < 20
    text = f"{unit * 1000} end"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_random_letters_without_a_break_take_no_time() -> None:
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=200_000))
    start = time.monotonic()
    train_tokenizer([letters], 2048)
    assert time.monotonic() - start < 20


def test_ctrl_c_does_not_wait_for_native_code() -> None:
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            _interruptible(lambda: time.sleep(30))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10


def test_errors_of_native_code_arrive() -> None:
    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _interruptible(fail)
