"""`moduleformer-ext convert`."""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from moduleformer_ext.cli.source import HELP, locate
from moduleformer_ext.data.files import new_directory
from moduleformer_ext.models import MoLMForCausalLM

FORMATS = ("native", "published")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", type=Path, help=HELP)
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--to", choices=FORMATS, default="native", help="format of the output (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Write a model, with its tokenizer if it has one, as a new directory in the wanted format."""
    if options.output.exists():
        raise FileExistsError(f"convert: '{options.output}' exists; name a folder to create")
    directory, tokenizer = locate(options.model)
    model = MoLMForCausalLM.from_pretrained(directory)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(options.output) as scratch:
        if options.to == "native":
            model.save_pretrained(scratch)
        else:
            _save_published(model, scratch)
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, scratch / tokenizer.name)
    print(f"wrote {options.output} ({options.to} format)")
    return 0


def _save_published(model: MoLMForCausalLM, directory: Path) -> None:
    config, state = model.to_reference()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}  # tied ones share memory
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
