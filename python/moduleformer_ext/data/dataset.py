"""A tokenised corpus on disk: the tokenizer and one stream per domain and split."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from moduleformer_ext.data.corpus import Document
from moduleformer_ext.data.split import split_documents
from moduleformer_ext.data.stream import TokenStream, map_tokens, save_tokens, tokenize
from moduleformer_ext.data.tokenizer import load_tokenizer, train_tokenizer
from moduleformer_ext.files import new_directory

_INDEX = "index.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Dataset:
    """Streams by domain, of both splits, under the tokenizer that was trained on the training split."""

    tokenizer: Tokenizer
    train: dict[str, TokenStream]
    held_out: dict[str, TokenStream]

    @property
    def domains(self) -> list[str]:
        """Names of the domains, sorted."""
        return sorted(self.train)


def build_dataset(
    directory: Path,
    documents: Sequence[Document],
    *,
    vocab_size: int,
    held_out_fraction: float,
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """Split, train the tokenizer on the training split alone, tokenise, and write all of it to `directory`.

    A `tokenizer` that is given is used instead. `directory` must not exist; it appears complete or not at all.
    """
    split = split_documents(documents, held_out_fraction)
    if tokenizer is None:
        tokenizer = train_tokenizer((document.text for document in split.train), vocab_size)
    index: dict[str, dict[str, dict[str, int]]] = {}
    with new_directory(directory) as scratch:
        tokenizer.save(str(scratch / TOKENIZER))
        for name, members in (("train", split.train), ("held_out", split.held_out)):
            index[name] = {}
            for domain in sorted({document.domain for document in members}):
                stream = tokenize([document for document in members if document.domain == domain], tokenizer)
                save_tokens(scratch / f"{name}.{domain}.npy", stream.tokens)
                index[name][domain] = {"num_bytes": stream.num_bytes, "num_documents": stream.num_documents}
        (scratch / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return open_dataset(directory)


def open_dataset(directory: Path) -> Dataset:
    """Open what `build_dataset` wrote; tokens stay on disk, memory-mapped."""
    if not (directory / _INDEX).is_file():
        raise FileNotFoundError(f"dataset: '{directory}' holds no tokenised corpus ({_INDEX} is missing)")
    index = json.loads((directory / _INDEX).read_text())

    def streams(split: str) -> dict[str, TokenStream]:
        return {
            domain: TokenStream(map_tokens(directory / f"{split}.{domain}.npy"), **sizes)
            for domain, sizes in index[split].items()
        }

    return Dataset(load_tokenizer(directory / TOKENIZER), streams("train"), streams("held_out"))
