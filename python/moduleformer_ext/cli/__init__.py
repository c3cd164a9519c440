"""The `moduleformer-ext` command: one module per verb, loaded only when asked for.

A verb is an entry of VERBS and `cli/<verb>.py` with a function `run`.
"""

import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Final

VERBS: Final = {
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
_TRACEBACK = "--traceback"
_HELP = f"""usage: moduleformer-ext VERB ...

The modular language models of moduleformer_ext.

{chr(10).join(f"  {verb:<10} {summary}" for verb, summary in VERBS.items())}

`moduleformer-ext VERB --help` explains a verb; with {_TRACEBACK} its errors say where in the code they arose."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. Complaints about the input go to stderr, in one line, with status 2."""
    # OpenMP threads that spin while they wait slow one another down tens of times on a machine that is also busy
    # with something else. The variable counts until torch is imported, which only a verb does.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows its number
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-h"], ["--help"]):
        print(_HELP)
        return 0
    if not words or words[0] not in VERBS:
        got = f"'{words[0]}'" if words else "none"
        print(f"moduleformer-ext: VERB must be one of {', '.join(VERBS)}, got {got}; see --help", file=sys.stderr)
        return 2
    name = f"moduleformer-ext {words[0]}"
    try:
        return _run(words[0], [word for word in words[1:] if word != _TRACEBACK])
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has enough
        sys.stderr.close()
        return 1
    except Exception as error:
        message = _expected(error)
        if message is None or _TRACEBACK in words:
            raise
        print(f"{name}: {message}", file=sys.stderr)
        return 2


def _run(verb: str, words: list[str]) -> int:
    from cyclopts import App, Parameter  # only a verb pays for it

    app = App(
        name=f"moduleformer-ext {verb}",
        help=f"{VERBS[verb][0].upper()}{VERBS[verb][1:]}.",
        default_parameter=Parameter(allow_repeating=True, consume_multiple=1, negative_iterable=(), negative_none=()),
        version_flags=(),
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    app["--help"].group = "Parameters"
    app.default(importlib.import_module(f"{__name__}.{verb}").run)
    return int(app(words) or 0)


def _expected(error: Exception) -> str | None:
    """What a user can be told of an error in one line; None for a fault of the program."""
    from cyclopts import CycloptsError
    from cyclopts.exceptions import MissingArgumentError
    from pydantic import ValidationError

    from moduleformer_ext.records import complaint

    match error:
        case CycloptsError(__cause__=ValidationError() as cause):
            field, problem = complaint(cause)
            return f"--{field.replace('_', '-')} {problem}" if field else problem
        case MissingArgumentError(argument=argument) if argument is not None:
            return f"{argument.name} must be given a value"
        case CycloptsError() | ValueError() | OSError() | FloatingPointError() | ImportError():
            return " ".join(str(error).split("\n"))
        case MemoryError():
            return "there is not enough memory"
        case RuntimeError() if "allocate" in str(error):
            return f"there is not enough memory: {str(error).splitlines()[0]}"
    return None
