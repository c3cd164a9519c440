"""`moduleformer-ext compare`."""

import argparse
import json
from pathlib import Path

from moduleformer_ext.cli.source import HELP, locate
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import compare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("first", type=Path, help=HELP)
    parser.add_argument("second", type=Path, help="the model to compare it with")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Print which experts changed, and by how much, came and went."""
    models = [MoLMForCausalLM.from_pretrained(locate(path)[0]) for path in (options.first, options.second)]
    found = compare(*models)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.summary())
    return 0
