"""Token streams: the documents of one domain and split, end to end, in one memory-mapped array."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from moduleformer_ext.data.corpus import Document
from moduleformer_ext.data.tokenizer import encode_texts, end_of_text_id
from moduleformer_ext.display import progress
from moduleformer_ext.files import writing

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
_DOCUMENTS_AT_ONCE = 256


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
    """Encode documents in the given order; `advance` is told of documents as they are done."""
    width = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    separator = np.array([end_of_text_id(tokenizer)], dtype=width)
    pieces = [separator]
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[start : start + _DOCUMENTS_AT_ONCE]]
        for ids in encode_texts(tokenizer, texts):
            pieces += [np.array(ids, dtype=width), separator]
        advance(len(texts))
    num_bytes = sum(len(document.text.encode()) for document in documents)
    return TokenStream(np.concatenate(pieces), num_bytes, len(documents))


def tokenize_domains(documents: Sequence[Document], tokenizer: Tokenizer) -> dict[str, TokenStream]:
    """Encode documents into one stream per domain, showing progress."""
    domains = sorted({document.domain for document in documents})
    with progress("tokenising", len(documents), keep=False) as bar:
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
