"""`moduleformer-ext prune`."""

import argparse
from functools import reduce
from operator import add
from pathlib import Path

from tokenizers import Tokenizer

from moduleformer_ext.cli.measure import add_measuring_arguments, measure
from moduleformer_ext.cli.source import HELP, check_new, load_source, locate, new_model_directory
from moduleformer_ext.cli.usage import read_counts
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import NORMALISERS, ExpertUsage, plan_by_size, plan_by_threshold, prune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = "With --domain, what stays is that domain's part of the model, as a model of its own."
    parser.add_argument("model", type=Path, help=HELP)
    parser.add_argument("output", type=Path, help="folder to create")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--threshold", type=float, metavar="F", help="prune experts whose frequency is below F")
    amount.add_argument(
        "--remaining", type=float, metavar="F", help="prune the least frequent ones until F of the parameters are left"
    )
    parser.add_argument(
        "--normalise",
        choices=NORMALISERS,
        default="max",
        help="an expert's frequency is relative to the layer's busiest one, or to all (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-normaliser", action="store_true", help="keep the pruned experts' router rows in the softmax"
    )
    parser.add_argument("--usage", type=Path, metavar="FOLDER", help="counts that `usage` wrote, instead of text")
    parser.add_argument("--domain", nargs="+", help="count these domains only (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="only print what would go")
    add_measuring_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Write a smaller model with the experts that the text uses."""
    if not options.dry_run:
        check_new("prune", options.output)
    if options.usage and options.text:
        raise ValueError("--usage: gives the counts already; leave --text out")
    model, tokenizer = load_source(options.model)
    usage = _usage(options, model, tokenizer)
    settings = {"normalise": options.normalise, "keep_normaliser": options.keep_normaliser}
    if options.threshold is not None:
        plan = plan_by_threshold(model.config, usage, options.threshold, **settings)
    else:
        plan = plan_by_size(model.config, usage, options.remaining, **settings)
    print(plan.summary())
    if not options.dry_run:
        with new_model_directory(options.output, locate(options.model)[1]) as scratch:
            prune(model, plan).save_pretrained(scratch)
        print(f"wrote {options.output}")
    return 0


def _usage(options: argparse.Namespace, model: MoLMForCausalLM, tokenizer: Tokenizer) -> ExpertUsage:
    if options.usage:
        by_domain = read_counts(options.usage)
    else:
        by_domain = {domain: score.usage for domain, score in measure(options, model, tokenizer).items()}
    domains = options.domain or list(by_domain)
    if unknown := [domain for domain in domains if domain not in by_domain]:
        raise ValueError(f"--domain: there are {', '.join(by_domain)}, got {', '.join(unknown)}")
    return reduce(add, (by_domain[domain] for domain in domains))
