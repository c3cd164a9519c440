"""`moduleformer-ext extend`."""

import argparse
from pathlib import Path

from moduleformer_ext.cli.source import HELP, check_new, locate, new_model_directory
from moduleformer_ext.cli.usage import read_counts
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import INITS, count_parameters, insert_experts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = "Train the new experts with `moduleformer-ext finetune --trainable new`."
    parser.add_argument("model", type=Path, help=HELP)
    parser.add_argument("output", type=Path, help="folder to create")
    for kind in ("attention", "ffn"):
        parser.add_argument(
            f"--{kind}", type=int, nargs="+", default=[0], metavar="N", help="new experts: one number, or one per layer"
        )
    parser.add_argument(
        "--init", choices=INITS, default="random", help="copy: from experts of the layer (default: %(default)s)"
    )
    parser.add_argument("--usage", type=Path, metavar="FOLDER", help="counts of `usage`: copy the most used experts")
    parser.add_argument("--domain", help="the domain of --usage that counts (default: its only one)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Write a model with more experts."""
    check_new("extend", options.output)
    directory, tokenizer = locate(options.model)
    usage = None
    if options.usage:
        by_domain = read_counts(options.usage)
        domain = options.domain or (next(iter(by_domain)) if len(by_domain) == 1 else None)
        if domain not in by_domain:
            raise ValueError(f"--domain: must be one of {', '.join(by_domain)}, got {options.domain}")
        usage = by_domain[domain]
    model = MoLMForCausalLM.from_pretrained(directory)
    numbers = {
        kind: given[0] if len(given) == 1 else given
        for kind, given in (("attention", options.attention), ("ffn", options.ffn))
    }
    extended = insert_experts(model, **numbers, init=options.init, usage=usage, seed=options.seed)
    with new_model_directory(options.output, tokenizer) as scratch:
        extended.save_pretrained(scratch)
    before, after = count_parameters(model.config), count_parameters(extended.config)
    print(f"wrote {options.output}: {before} -> {after} parameters, {after - before} of them new")
    return 0
