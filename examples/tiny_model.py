"""What the examples share: a model trained for a few seconds on this repository's Python code and its documents.

    python examples/tiny_model.py

The first example to run trains it, in runs/examples/base; the others find it there.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from moduleformer_ext.data import Dataset, TokenStream, text_files, tokenize
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.train import RunDirectory, TrainConfig, evaluate, is_run, run_session

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = Path("runs/examples")
BASE = FOLDER / "base"
LENGTH = 128


def tiny_model() -> tuple[MoLMForCausalLM, Dataset]:
    """The model, and its texts by domain: code and prose, to train on and held out."""
    if is_run(BASE):
        run = RunDirectory.open(BASE)
    else:
        config = TrainConfig(
            text=(f"code={REPOSITORY / 'python'}", f"prose={REPOSITORY / 'docs'}"),
            vocab_size=512,
            preset="molm-nano",
            segment_length=LENGTH,
            history_length=LENGTH,
            steps=60,
            dtype="fp32",
        )
        run = RunDirectory.create(BASE, config)
    if not run.evaluation.exists():
        run_session(run)
    return MoLMForCausalLM.from_pretrained(run.checkpoints.latest()).eval(), run.dataset()


def read_text(folder: str, data: Dataset) -> TokenStream:
    """Another folder of the repository, in the model's tokens."""
    return tokenize(text_files([f"text={REPOSITORY / folder}"]), data.tokenizer)


def batches(stream: TokenStream, number: int) -> Iterator[torch.Tensor]:
    """Token batches [4, LENGTH + 1], one after another."""
    size = 4 * (LENGTH + 1)
    tokens = torch.from_numpy(stream.tokens[: number * size].astype("int64"))
    return (batch.view(4, -1) for batch in tokens.split(size) if len(batch) == size)


def bits_per_byte(model: MoLMForCausalLM, stream: TokenStream) -> float:
    """How well the model predicts a text."""
    return evaluate(model, {"text": stream}, segment_length=LENGTH)["text"].bits_per_byte


if __name__ == "__main__":
    trained, texts = tiny_model()
    for domain, held_out in texts.held_out.items():
        print(f"{domain}: {bits_per_byte(trained, held_out):.3f} bits per byte")
