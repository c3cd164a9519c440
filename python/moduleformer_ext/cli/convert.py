"""`moduleformer-ext convert`."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from moduleformer_ext.cli.source import Model, Output, check_new, locate, new_model_directory
from moduleformer_ext.files import save_tensors, to_json, write_file
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.records import Record


@Parameter(name="*")
class Options(Record):
    """Into what."""

    to: Literal["native", "published", "hf"] = "native"
    """format of the output; hf: for transformers, which has to be installed"""


def run(model: Model, output: Output, /, *, options: Options = Options()) -> int:
    """Write a model, with its tokenizer if it has one, as a new directory in the wanted format."""
    check_new(output)
    directory, tokenizer = locate(model)
    save_hf = _save_hf() if options.to == "hf" else None
    source = MoLMForCausalLM.from_pretrained(directory)
    with new_model_directory(output, tokenizer) as scratch:
        if options.to == "native":
            source.save_pretrained(scratch)
        elif save_hf:
            save_hf(source, scratch, tokenizer if tokenizer.is_file() else None)
        else:
            _save_published(source, scratch)
    print(f"wrote {output} ({options.to} format)")
    return 0


def _save_hf() -> Callable[[MoLMForCausalLM, Path, Path | None], None]:
    from moduleformer_ext.hf import save_directory  # an ImportError says what to install

    return save_directory


def _save_published(model: MoLMForCausalLM, directory: Path) -> None:
    config, state = model.to_reference()
    write_file(directory / "config.json", to_json(config))
    tensors = {name: tensor.clone() for name, tensor in state.items()}  # tied ones share memory
    save_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
