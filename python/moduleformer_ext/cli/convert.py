"""`moduleformer-ext convert`."""

import re
from collections.abc import Callable
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import AfterValidator

from moduleformer_ext.cli.source import Model, Output, check_new, locate, new_model_directory
from moduleformer_ext.data import TOKENIZER, write_tokenizer_config
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.models.checkpoint import save_published
from moduleformer_ext.records import Record


def _check_size(size: str | None) -> str | None:
    if size is not None and not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", size):
        raise ValueError(f"must be a number of KB, MB, GB or TB, such as 5GB, got {size}")
    return size


@Parameter(name="*")
class Options(Record):
    """Into what."""

    to: Literal["native", "published", "hf"] = "native"
    """format of the output; hf: for transformers, which has to be installed"""
    max_shard_size: Annotated[str | None, AfterValidator(_check_size)] = None
    """published and hf: weights larger than this go into several files (default: 5GB)"""


def run(model: Model, output: Output, /, *, options: Options = Options()) -> int:
    """Write a model, with its tokenizer if it has one, as a new directory in the wanted format."""
    check_new(output, model)
    directory, tokenizer = locate(model)
    if options.max_shard_size is not None and options.to == "native":
        raise ValueError("--max-shard-size: is for published and hf; the native format is one file")
    size = options.max_shard_size or "5GB"
    save_hf = _save_hf() if options.to == "hf" else None
    source = MoLMForCausalLM.from_pretrained(directory)
    with new_model_directory(output, tokenizer) as scratch:
        if options.to == "native":
            source.save_pretrained(scratch)
        elif save_hf:
            save_hf(source, scratch, scratch / TOKENIZER if tokenizer.exists() else None, max_shard_size=size)
        else:
            save_published(source, scratch, size)
            if tokenizer.exists():
                write_tokenizer_config(scratch)
    print(f"wrote {output} ({options.to} format)")
    return 0


def _save_hf() -> Callable[..., None]:
    from moduleformer_ext.hf import save_directory  # an ImportError says what to install

    return save_directory
