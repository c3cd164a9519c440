"""`moduleformer-ext eval`."""

import argparse
import json
from pathlib import Path

from moduleformer_ext.cli.measure import add_measuring_arguments, measure
from moduleformer_ext.cli.source import HELP, load_source
from moduleformer_ext.surgery import plot_expert_usage
from moduleformer_ext.train import Score, overall_bits_per_byte


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", type=Path, help=HELP)
    add_measuring_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--expert-usage", type=Path, metavar="PNG", help="draw the experts' use by domain")


def run(options: argparse.Namespace) -> int:
    """Measure a model on held-out or given text."""
    model, tokenizer = load_source(options.model)
    scores = measure(options, model, tokenizer)
    if options.expert_usage:
        plot_expert_usage(options.expert_usage, {domain: score.usage for domain, score in scores.items()})
    print(_as_json(scores) if options.json else _as_table(scores))
    return 0


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
