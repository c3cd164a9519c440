"""`moduleformer-ext merge`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moduleformer_ext.cli.source import First, Output, check_new, locate, new_model_directory
from moduleformer_ext.data import load_tokenizer
from moduleformer_ext.files import read_text
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import count_parameters, merge


def run(
    first: First,
    second: Annotated[Path, Parameter(help="a model extended from the same base")],
    output: Output,
    /,
) -> int:
    """Write a model with the experts of both."""
    directories, tokenizers = zip(*map(locate, (first, second)), strict=True)
    check_new(output, first, second)
    texts = [_content(path) for path in tokenizers]
    if texts[0] != texts[1]:
        raise ValueError(f"models must have the same tokenizer, got '{tokenizers[0]}' and '{tokenizers[1]}'")
    models = [MoLMForCausalLM.from_pretrained(directory) for directory in directories]
    merged = merge(*models)
    with new_model_directory(output, tokenizers[0]) as scratch:
        merged.save_pretrained(scratch)
    sizes = [count_parameters(model.config) for model in (*models, merged)]
    print(f"wrote {output}: {sizes[2]} parameters, of models with {sizes[0]} and {sizes[1]}")
    return 0


def _content(tokenizer: Path) -> str | None:
    if tokenizer.is_dir():
        return load_tokenizer(tokenizer).to_str(pretty=True)
    return read_text(tokenizer) if tokenizer.is_file() else None
