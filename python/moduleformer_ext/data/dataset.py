"""A tokenised corpus on disk: the tokenizer and one stream per domain and split."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from typing_extensions import TypedDict  # pydantic reads the typing module's from Python 3.12 on

from moduleformer_ext.data.corpus import Document
from moduleformer_ext.data.split import split_documents
from moduleformer_ext.data.stream import TokenStream, map_tokens, save_tokens, tokenize_domains
from moduleformer_ext.data.tokenizer import TOKENIZER, load_tokenizer, train_tokenizer
from moduleformer_ext.files import new_directory, read_json, to_json, write_file

_INDEX = "index.json"


class _Sizes(TypedDict):
    num_bytes: int
    num_documents: int


class _Index(TypedDict):
    """By domain."""

    train: dict[str, _Sizes]
    held_out: dict[str, _Sizes]


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
        tokenizer = train_tokenizer((piece for document in split.train for piece in document.text.pieces()), vocab_size)
    index: _Index = {"train": {}, "held_out": {}}
    with new_directory(directory) as scratch:
        write_file(scratch / TOKENIZER, tokenizer.to_str(pretty=True))
        for name, members, sizes in (
            ("train", split.train, index["train"]),
            ("held_out", split.held_out, index["held_out"]),
        ):
            for domain, stream in tokenize_domains(members, tokenizer).items():
                save_tokens(scratch / f"{name}.{domain}.npy", stream.tokens)
                sizes[domain] = {"num_bytes": stream.num_bytes, "num_documents": stream.num_documents}
        write_file(scratch / _INDEX, to_json(index))
    return open_dataset(directory)


def open_dataset(directory: Path) -> Dataset:
    """Open what `build_dataset` wrote; tokens stay on disk, memory-mapped."""
    if not (directory / _INDEX).is_file():
        raise FileNotFoundError(f"dataset: '{directory}' holds no tokenised corpus ({_INDEX} is missing)")
    index = read_json(directory / _INDEX, _Index)

    def streams(split: str, domains: dict[str, _Sizes]) -> dict[str, TokenStream]:
        return {
            domain: TokenStream(map_tokens(directory / f"{split}.{domain}.npy"), **sizes)
            for domain, sizes in domains.items()
        }

    tokenizer = load_tokenizer(directory / TOKENIZER)
    return Dataset(tokenizer, streams("train", index["train"]), streams("held_out", index["held_out"]))
