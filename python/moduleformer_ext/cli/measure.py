"""Options and streams of the verbs that read text with a model."""

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from moduleformer_ext.data import Document, TokenStream, open_dataset, text_files, tokenize
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.train import RunDirectory, Score, evaluate, is_run


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the text to read and how."""
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help="text files or folders, PATH or DOMAIN=PATH (default, for a run: its held-out text)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="lanes read in parallel (default: %(default)s)")
    parser.add_argument(
        "--segment-length", type=int, default=512, help="tokens per forward pass (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")


def measure(options: argparse.Namespace, model: MoLMForCausalLM, tokenizer: Tokenizer) -> dict[str, Score]:
    """Read the held-out or given text, domain by domain."""
    return evaluate(
        model,
        _streams(options.text, options.model, tokenizer),
        batch_size=options.batch_size,
        segment_length=options.segment_length,
        dtype=options.dtype,
    )


def _streams(text: list[str] | None, source: Path, tokenizer: Tokenizer) -> dict[str, TokenStream]:
    if text:
        return _streams_of(text_files(text), tokenizer)
    if is_run(source):
        return open_dataset(RunDirectory.open(source).data).held_out
    raise ValueError(f"--text: '{source}' has no held-out text of its own; name files or folders")


def _streams_of(documents: list[Document], tokenizer: Tokenizer) -> dict[str, TokenStream]:
    domains = sorted({document.domain for document in documents})
    return {
        domain: tokenize([document for document in documents if document.domain == domain], tokenizer)
        for domain in domains
    }
