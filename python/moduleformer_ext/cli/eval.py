"""`moduleformer-ext eval`."""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer

from moduleformer_ext.cli.source import HELP, load_source
from moduleformer_ext.data import Document, TokenStream, open_dataset, text_files, tokenize
from moduleformer_ext.surgery import plot_expert_usage
from moduleformer_ext.train import RunDirectory, Score, evaluate, is_run, overall_bits_per_byte


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", type=Path, help=HELP)
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
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--expert-usage", type=Path, metavar="PNG", help="draw the experts' use by domain")


def run(options: argparse.Namespace) -> int:
    """Measure a model on held-out or given text."""
    model, tokenizer = load_source(options.model)
    if options.text:
        streams = _streams_of(text_files(options.text), tokenizer)
    elif is_run(options.model):
        streams = open_dataset(RunDirectory.open(options.model).data).held_out
    else:
        raise ValueError(f"--text: '{options.model}' has no held-out text of its own; name files or folders")
    scores = evaluate(
        model,
        streams,
        batch_size=options.batch_size,
        segment_length=options.segment_length,
        dtype=options.dtype,
    )
    if options.expert_usage:
        plot_expert_usage(options.expert_usage, {domain: score.usage for domain, score in scores.items()})
    print(_as_json(scores) if options.json else _as_table(scores))
    return 0


def _streams_of(documents: list[Document], tokenizer: Tokenizer) -> dict[str, TokenStream]:
    domains = sorted({document.domain for document in documents})
    return {
        domain: tokenize([document for document in documents if document.domain == domain], tokenizer)
        for domain in domains
    }


def _as_json(scores: dict[str, Score]) -> str:
    rows = {
        domain: {
            "bits_per_byte": score.bits_per_byte,
            "perplexity": score.perplexity,
            "num_tokens": score.num_tokens,
            "num_bytes": score.num_bytes,
        }
        for domain, score in scores.items()
    }
    return json.dumps({"bits_per_byte": overall_bits_per_byte(scores), "domains": rows}, indent=2)


def _as_table(scores: dict[str, Score]) -> str:
    width = max(len(domain) for domain in (*scores, "all"))
    lines = [f"{'':<{width}}  bits/byte  perplexity     tokens      bytes"]
    lines += [
        f"{domain:<{width}}  {score.bits_per_byte:9.4f}  {score.perplexity:10.3f}  "
        f"{score.num_tokens:9d}  {score.num_bytes:9d}"
        for domain, score in scores.items()
    ]
    lines.append(f"{'all':<{width}}  {overall_bits_per_byte(scores):9.4f}")
    return "\n".join(lines)
