"""Where a verb's model comes from, a run or a directory with a model in our own or the published format, and where a
new one goes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter
from tokenizers import Tokenizer

from moduleformer_ext.data import TOKENIZER, find_tokenizer, load_tokenizer, write_tokenizer
from moduleformer_ext.files import new_directory
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.records import Record, Text
from moduleformer_ext.train import RunDirectory, check_outside, is_run, run_around

_HELP = "a run directory, or a directory with config.json, tokenizer.json and weights"
Model = Annotated[Path, Parameter(name="model", help=_HELP)]
First = Annotated[Path, Parameter(help=_HELP)]
Output = Annotated[Path, Parameter(help="folder to create")]
Switch = Annotated[bool, Parameter(negative=())]
AsJson = Annotated[bool, Parameter(name="--json", negative=(), help="print JSON instead of a table")]


def locate(path: Path) -> tuple[Path, Path]:
    """Return the model directory and the tokenizer that `path` stands for (a run: its newest checkpoint)."""
    if is_run(path):
        run = RunDirectory.open(path)
        checkpoint = run.checkpoints.latest()
        if checkpoint is None:
            raise FileNotFoundError(f"run: '{path}' has no checkpoint yet")
        return checkpoint, run.data / TOKENIZER
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"model: '{path}' {_what_is_wrong(path)}")
    of_run = run_of(path)
    return path, find_tokenizer(path) if of_run is None else of_run.data / TOKENIZER


def run_of(path: Path) -> RunDirectory | None:
    """The run that `path` is, or one of whose checkpoints it is."""
    if is_run(path):
        return RunDirectory.open(path)
    folder = path.resolve().parent
    return RunDirectory.open(folder.parent) if folder.name == "checkpoints" and is_run(folder.parent) else None


def _what_is_wrong(path: Path) -> str:
    """Why something is no model, and what to name instead."""
    if path.is_file():
        return "is a file; name the folder that holds config.json and the weights"
    if not path.exists():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
        fetch = f"; a model of the Hugging Face Hub comes with: hf download {path} --local-dir FOLDER"
        return f"does not exist{fetch if hub else ''}"
    if (path / "adapter_config.json").is_file():
        return "is an adapter of peft, not a model; merge it into its model (merge_and_unload) and save that"
    if run := run_around(path):
        return f"is neither a run nor a model directory; it belongs to the run '{run}', name that"
    return "is neither a run nor a model directory (no config.json)"


class Running(Record):
    """Where and in what arithmetic a model runs."""

    device: Text = "cpu"
    """torch device"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """arithmetic; auto: of the type that the weights are stored in"""


_DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be a torch device of this machine, got {device}: {reason}") from error


def load_source(path: Path, device: str = "cpu", dtype: str = "auto") -> tuple[MoLMForCausalLM, Tokenizer]:
    """Load model, in evaluation mode, and tokenizer, which must belong together. `dtype` converts the weights."""
    check_device(device)
    directory, found = locate(path)
    tokenizer = load_tokenizer(found)
    model = MoLMForCausalLM.from_pretrained(directory, dtype=_DTYPES[dtype], device=device).eval()
    if (entries := tokenizer.get_vocab_size()) > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: '{found}' must have at most {model.config.vocab_size} entries, those of the model, "
            f"got {entries}"
        )
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise FloatingPointError(f"model: the weights in '{directory}' must be finite, got others in {name}")
    return model, tokenizer


def check_picture(path: Path) -> Path:
    """Refuse what is no name for a picture."""
    if path.suffix != ".png" or not path.parent.is_dir():
        raise ValueError(f"must be a .png file in a folder that exists, got {path}")
    return path


def check_new(output: Path, *sources: Path) -> None:
    """Refuse an output that exists, or that would lie in a run or in one of the sources."""
    if output.exists():
        raise FileExistsError(f"'{output}' exists; name a folder to create")
    check_outside(output, *sources)


@contextmanager
def new_model_directory(output: Path, tokenizer: Path) -> Iterator[Path]:
    """A scratch folder that becomes `output`, with the tokenizer if there is one, when the block ends well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(output) as scratch:
        if tokenizer.exists():
            write_tokenizer(tokenizer, scratch)
        yield scratch
        if tokenizer.exists():  # as it was: transformers writes it in another form
            write_tokenizer(tokenizer, scratch)
