"""The `moduleformer-ext` command: one module per verb, loaded only when asked for."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

VERBS = {
    "train": "train a model on text files, or continue a run",
    "generate": "continue a prompt with a trained or published model",
    "eval": "measure bits per byte and perplexity",
    "convert": "change between this package's and the published checkpoint format",
    "usage": "count which experts each domain of text uses",
    "prune": "remove the experts that a text does not use",
    "extend": "insert new experts",
    "finetune": "train a model further: all of it, its experts, or new experts alone",
    "compare": "follow every expert from one model to another",
    "merge": "put the experts of two extended models into one",
    "info": "print versions, build flags and the kernels available",
    "demo": "train a small model on the standard library in five minutes",
}
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. Complaints about the input go to stderr in words."""
    # OpenMP threads that spin while they wait slow one another down tens of times on a machine that is also busy
    # with something else. The variable counts until torch is imported, which only a verb does.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="moduleformer-ext", description=__doc__.split(":")[0] + ".")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    chosen = next((word for word in words if word in VERBS), None)
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if name == chosen:  # only this one's imports are paid for
            module = importlib.import_module(f".{name}", __name__)
            module.add_arguments(verb)
            verb.set_defaults(command=module.run)
            verb.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    options = parser.parse_args(words)
    try:
        return int(options.command(options))
    except KeyboardInterrupt:
        print(f"\nmoduleformer-ext {options.verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has enough
        sys.stderr.close()
        return 1
    except (ValueError, OSError, FloatingPointError) as error:
        if options.traceback:
            raise
        print(f"moduleformer-ext {options.verb}: {error}", file=sys.stderr)
        return 2
