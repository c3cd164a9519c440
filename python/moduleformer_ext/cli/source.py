"""Where a verb's model comes from, a run or a directory with a model in our own or the published format, and where a
new one goes.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from moduleformer_ext.data import load_tokenizer
from moduleformer_ext.data.dataset import TOKENIZER
from moduleformer_ext.files import new_directory
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.train import RunDirectory, is_run

HELP = "a run directory, or a directory with config.json, tokenizer.json and weights"


def locate(path: Path) -> tuple[Path, Path]:
    """Return the model directory and the tokenizer file that `path` stands for (a run: its newest checkpoint)."""
    if is_run(path):
        run = RunDirectory.open(path)
        checkpoint = run.checkpoints.latest()
        if checkpoint is None:
            raise FileNotFoundError(f"run: '{path}' has no checkpoint yet")
        return checkpoint, run.data / TOKENIZER
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"model: '{path}' is neither a run nor a model directory (no config.json)")
    return path, path / TOKENIZER


def load_source(path: Path) -> tuple[MoLMForCausalLM, Tokenizer]:
    """Load model, in evaluation mode, and tokenizer."""
    directory, tokenizer = locate(path)
    return MoLMForCausalLM.from_pretrained(directory).eval(), load_tokenizer(tokenizer)


def check_new(verb: str, output: Path) -> None:
    """Refuse an output that exists."""
    if output.exists():
        raise FileExistsError(f"{verb}: '{output}' exists; name a folder to create")


@contextmanager
def new_model_directory(output: Path, tokenizer: Path) -> Iterator[Path]:
    """A scratch folder that becomes `output`, with the tokenizer if there is one, when the block ends well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(output) as scratch:
        yield scratch
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, scratch / TOKENIZER)
