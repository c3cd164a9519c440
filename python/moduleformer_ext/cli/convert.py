"""`moduleformer-ext convert`."""

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file

from moduleformer_ext.cli.source import HELP, check_new, locate, new_model_directory
from moduleformer_ext.models import MoLMForCausalLM

FORMATS = ("native", "published")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", type=Path, help=HELP)
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--to", choices=FORMATS, default="native", help="format of the output (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Write a model, with its tokenizer if it has one, as a new directory in the wanted format."""
    check_new("convert", options.output)
    directory, tokenizer = locate(options.model)
    model = MoLMForCausalLM.from_pretrained(directory)
    with new_model_directory(options.output, tokenizer) as scratch:
        if options.to == "native":
            model.save_pretrained(scratch)
        else:
            _save_published(model, scratch)
    print(f"wrote {options.output} ({options.to} format)")
    return 0


def _save_published(model: MoLMForCausalLM, directory: Path) -> None:
    config, state = model.to_reference()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}  # tied ones share memory
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
