"""Token streams: the documents of one domain and split, end to end, in one memory-mapped array."""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from moduleformer_ext.data.corpus import Document
from moduleformer_ext.data.texts import PIECE
from moduleformer_ext.data.tokenizer import encode_texts, end_of_text_id, where_to_cut
from moduleformer_ext.display import progress
from moduleformer_ext.files import writing

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
_BATCH = 8 * PIECE
"""Bytes of texts that are encoded at a time, on as many threads as there are."""


@dataclass(frozen=True)
class TokenStream:
    """Token ids [N] of some documents, with `END_OF_TEXT` before, between and after them.

    A model is scored on tokens[1:], each given those before it: every byte of the text and where it ends.
    """

    tokens: TokenArray
    num_bytes: int
    num_documents: int

    @property
    def num_scored(self) -> int:
        """Number of predicted tokens."""
        return len(self.tokens) - 1


def tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, advance: Callable[[int], None] = lambda _: None
) -> TokenStream:
    """Encode documents in the given order; `advance` is told of the bytes of those that are done."""
    code, width = ("H", np.uint16) if tokenizer.get_vocab_size() <= 2**16 else ("I", np.uint32)
    separator = end_of_text_id(tokenizer)
    ids, num_bytes = array(code, [separator]), 0
    for batch in _batches(documents, where_to_cut(tokenizer)):
        for piece, piece_ids in zip(batch, encode_texts(tokenizer, [piece.text for piece in batch]), strict=True):
            ids.extend(piece_ids)
            if piece.is_last:
                ids.append(separator)
        size = sum(piece.size for piece in batch)
        num_bytes += size
        advance(size)
    return TokenStream(np.frombuffer(ids, dtype=width), num_bytes, len(documents))


class _Piece(NamedTuple):
    text: str
    size: int
    """In bytes."""
    is_last: bool
    """Of its document."""


def _batches(documents: Iterable[Document], places: re.Pattern[bytes] | None) -> Iterator[list[_Piece]]:
    """Pieces of the documents, as many as are encoded together."""
    batch: list[_Piece] = []
    room = _BATCH
    for document in documents:
        rest = len(document.text)
        for text in document.text.pieces(places, PIECE):
            size = len(text.encode())
            rest -= size
            batch.append(_Piece(text, size, is_last=not rest))
            room -= size
            if room <= 0:
                yield batch
                batch, room = [], _BATCH
    if batch:
        yield batch


def tokenize_domains(documents: Sequence[Document], tokenizer: Tokenizer) -> dict[str, TokenStream]:
    """Encode documents into one stream per domain, showing progress."""
    domains = sorted({document.domain for document in documents})
    with progress("tokenising bytes", sum(len(document.text) for document in documents), keep=False) as bar:
        return {
            domain: tokenize([d for d in documents if d.domain == domain], tokenizer, bar.advance) for domain in domains
        }


def save_tokens(path: Path, tokens: TokenArray) -> None:
    """Write token ids as .npy."""
    with writing(path):
        np.save(path, tokens, allow_pickle=False)


def map_tokens(path: Path) -> TokenArray:
    """Open token ids as a read-only memory map."""
    if not path.is_file():
        raise FileNotFoundError(f"tokens: '{path}' does not exist; the run's data is not whole")
    try:
        tokens: TokenArray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"tokens: '{path}' is not a whole .npy file: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind != "u":
        raise ValueError(f"tokens: '{path}' must hold unsigned integers [N], got {tokens.dtype} {tokens.shape}")
    return tokens
