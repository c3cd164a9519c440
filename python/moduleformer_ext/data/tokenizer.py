"""Byte-level BPE: any text becomes token ids and comes back byte for byte."""

import re
import shutil
import threading
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TypeVar

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from moduleformer_ext.data.texts import PLACES, any_of
from moduleformer_ext.files import read_json, read_text, to_json, write_file

END_OF_TEXT = "<|endoftext|>"
"""Stands before, between and after documents; the published MoLM tokenizer has the same."""

TOKENIZER = "tokenizer.json"
_BPE = ("vocab.json", "merges.txt")
_LONGEST_WORD = 256
"""In characters, while a tokenizer is trained: the time for a word grows with the square of its length."""
_Result = TypeVar("_Result")

MIN_VOCAB_SIZE = 257
"""The 256 bytes and `END_OF_TEXT`."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` entries; `END_OF_TEXT` gets id 0."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size: byte-level BPE needs at least {MIN_VOCAB_SIZE} entries, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(_LONGEST_WORD)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    _interruptible(lambda: tokenizer.train_from_iterator(texts, trainer))
    tokenizer.pre_tokenizer = words
    return tokenizer


def find_tokenizer(directory: Path) -> Path:
    """What `load_tokenizer` reads of a model's directory: its tokenizer.json, or itself where it has vocab.json and
    merges.txt instead.
    """
    file = directory / TOKENIZER
    return directory if not file.is_file() and all((directory / name).is_file() for name in _BPE) else file


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`, or a directory with one or with the `vocab.json` and `merges.txt` of a byte-level BPE,
    to which `added_tokens.json` may add. What it says of cutting and filling up texts is for batches of others.
    """
    if path.is_dir() and (path := find_tokenizer(path)).is_dir():
        return _load_bpe(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer: '{path}' does not exist; expected a tokenizer.json, or a folder with one or with "
            f"{' and '.join(_BPE)}"
        )
    text = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer: '{path}' is not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load_bpe(directory: Path) -> Tokenizer:
    vocab, merges = (directory / name for name in _BPE)
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer: '{vocab}' and '{merges}' are not a byte-level BPE: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT] if tokenizer.token_to_id(END_OF_TEXT) is not None else [])
    added = directory / "added_tokens.json"
    for token, token_id in sorted(read_json(added, dict[str, int]).items() if added.is_file() else (), key=_second):
        tokenizer.add_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != token_id:
            raise ValueError(
                f"tokenizer: '{added}' must number its entries on from those of vocab.json, got {token_id}"
            )
    return tokenizer


def _second(pair: tuple[str, int]) -> int:
    return pair[1]


def write_tokenizer(source: Path, directory: Path) -> None:
    """Write what `load_tokenizer(source)` reads as the tokenizer.json of a directory; one that is a file is copied."""
    if source.is_file():
        shutil.copyfile(source, directory / TOKENIZER)
    else:
        write_file(directory / TOKENIZER, load_tokenizer(source).to_str(pretty=True))


def write_tokenizer_config(directory: Path) -> None:
    """Beside a tokenizer.json, write the tokenizer_config.json that tells transformers which of its entries begins and
    ends a text and fills a batch; nothing for a tokenizer without `END_OF_TEXT`.
    """
    if load_tokenizer(directory / TOKENIZER).token_to_id(END_OF_TEXT) is not None:
        tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
        write_file(directory / "tokenizer_config.json", to_json(settings))


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id of `END_OF_TEXT`."""
    if (token_id := tokenizer.token_to_id(END_OF_TEXT)) is None:
        raise ValueError(f"tokenizer: must have an entry '{END_OF_TEXT}', which separates documents, got none")
    return int(token_id)


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text. A look-alike of `END_OF_TEXT` in a text is plain bytes."""
    for name, setting in (("truncation", tokenizer.truncation), ("padding", tokenizer.padding)):
        if setting is not None:
            raise ValueError(f"tokenizer: must have no {name}, which would change texts (no_{name}()), got {setting}")
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        encodings = _interruptible(lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [encoding.ids for encoding in encodings]
    finally:
        tokenizer.encode_special_tokens = before


_INK = ("a", "1", ".", "(", "}", "'s", "\u2019s", "я", "u\u0301", "日", "。", "\U0001f600", "\ue000")
"""What words and signs begin and end with: tokenizers have rules for letters, digits, contractions, other signs,
scripts and what is of none."""
_WHITE = (
    "\n", " ", "\t", "\r", "\u3000", "\u00a0 ", "\r\n", "\n\n", "\n ", " \n", "\n\t", "\t ", "  ", "\n    ", " " * 9,
    "\r\n\r\n", "\n\n\n ", "\n\u3000\u3000", " \n \n",
)  # fmt: skip
"""What is between them: one and several, of one kind and of two."""
_STOPS = ("の。", "日。", "日\uff0c", "語。」", "語\uff0c「")


def where_to_cut(tokenizer: Tokenizer) -> re.Pattern[bytes] | None:
    """Where a text may be cut such that its pieces have the tokens of the whole; None if not even lines can be parted.

    Found by trial: :data:`~moduleformer_ext.data.texts.PLACES` in between all kinds of signs and beside the entries
    that the tokenizer finds before it looks for words.
    """
    entries = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
    beside = [f"a{entry.content}a" for entry in entries]
    beside += [f"a{white}{e.content}{white}a" for e in entries if e.lstrip or e.rstrip for white in _WHITE]
    texts = [f"{a}{white}{b}" for a in _INK for white in (*_WHITE, *_STOPS) for b in _INK] + beside
    names = [name for name in PLACES if _parts(tokenizer, any_of([name]), texts)]
    return any_of(names) if names else None


def _parts(tokenizer: Tokenizer, places: re.Pattern[bytes], texts: Iterable[str]) -> bool:
    """Whether a tokenizer treats texts at these places alike in one and in two."""
    whole, before, after = [], [], []
    for text in texts:
        content = text.encode()
        for place in places.finditer(content):
            whole.append(text)
            before.append(content[: place.start()].decode())
            after.append(content[place.start() :].decode())
    split = tokenizer.pre_tokenizer
    if split is None:
        return False

    @cache
    def words(text: str) -> list[str]:
        return [word for word, _ in split.pre_tokenize_str(text)]

    if any(words(a + b) != words(a) + words(b) for a, b in zip(before, after, strict=True)):
        return False
    ids = encode_texts(tokenizer, [*whole, *before, *after])
    count = len(whole)
    return all(ids[i] == ids[count + i] + ids[2 * count + i] for i in range(count))


def _interruptible(work: Callable[[], _Result]) -> _Result:
    """Do `work`, which returns from native code only at its end, such that Ctrl-C does not wait for it."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]
    return results[0]
