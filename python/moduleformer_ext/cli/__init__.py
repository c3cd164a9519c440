"""The `moduleformer-ext` command: one module per verb, loaded only when asked for.

A verb is an entry of GROUPS and `cli/<verb>.py` with a function `run`.
"""

from __future__ import annotations

import importlib
import io
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

GROUPS: Final = {
    "Training": {
        "train": "train a model on text, or continue a run",
        "finetune": "train a model further: all of it, its experts, or new experts alone",
        "plot": "draw the loss curves of runs into one picture",
        "demo": "train a small model on the standard library in five minutes",
    },
    "Models": {
        "generate": "continue a prompt with a trained or published model",
        "chat": "talk to a model in the terminal",
        "eval": "measure bits per byte and perplexity",
        "convert": "change between the formats of this package, published models and transformers",
    },
    "Experts": {
        "usage": "count which experts each domain of text uses",
        "prune": "remove the experts that a text does not use",
        "extend": "insert new experts",
        "compare": "follow every expert from one model to another",
        "merge": "put the experts of two extended models into one",
        "quantise": "round the experts to 8 or 4 bits",
    },
    "Machine": {
        "info": "print versions, build flags and the kernels available",
        "bench": "measure the ops on this machine",
    },
}
VERBS: Final = {verb: summary for verbs in GROUPS.values() for verb, summary in verbs.items()}
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
_NAME = "moduleformer-ext"
_TRACEBACK = "--traceback"
_NARROW = 60
"""Columns below which help is printed without frames."""
_HELP = f"""The modular language models of moduleformer_ext.

`{_NAME} VERB --help` explains a verb; with {_TRACEBACK} its errors say where in the code they arose.

Exit status: 0 done; 1 a fault of the program, or a reader of its output that went away; 2 wrong input, which one line
on standard error names; {INTERRUPTED} interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. Complaints about the input go to stderr, in one line, with status 2."""
    # OpenMP threads that spin while they wait slow one another down tens of times on a machine that is also busy
    # with something else. The variable counts until torch is imported, which only a verb does.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows its number
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = words[0] if words else ""
    name = f"{_NAME} {verb}" if verb in VERBS else _NAME
    try:
        if verb in ("-h", "--help", "--version"):
            _top()(words[:1])
            status = 0
        elif verb not in VERBS:
            got = f"'{verb}'" if words else "none"
            raise ValueError(f"VERB must be one of {', '.join(VERBS)}, got {got}; see --help")
        else:
            status = _run(verb, [word for word in words[1:] if word != _TRACEBACK])
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has enough
        real = sys.__stdout__
        if real is not None and real is sys.stdout:  # what is left is flushed at the end, which must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), real.fileno())
        return 1
    except Exception as error:
        message = _expected(error)
        if message is None or _TRACEBACK in words:
            raise
        if not getattr(error, "said_by_another", False):
            print(f"{name}: {message}", file=sys.stderr)
        return 2


def _app(**options: Any) -> App:
    from cyclopts import App, Parameter  # only a verb pays for it

    return App(
        default_parameter=Parameter(
            allow_repeating=True, consume_multiple=1, negative_iterable=(), negative_none=(), show_default=_shown
        ),
        help_formatter="plain" if shutil.get_terminal_size().columns < _NARROW else "default",
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
        **options,
    )


def _shown(default: Any) -> str | None:
    """A default as the flag would be written; nothing is not worth a word."""
    if default is None or default is False or default == ():
        return None
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _top() -> App:
    """Knows the verbs by name alone."""
    from cyclopts import Group

    from moduleformer_ext._version import __version__

    app = _app(name=_NAME, help=_HELP, version=f"moduleformer_ext {__version__}", usage=f"Usage: {_NAME} VERB ...")
    for number, (title, verbs) in enumerate(GROUPS.items()):
        group = Group(title, sort_key=number)
        for place, (verb, summary) in enumerate(verbs.items()):
            app.command(_app(name=verb, help=summary, group=group, sort_key=place))
    options = Group("Options", sort_key=len(GROUPS))
    for flag in ("--help", "--version"):
        app[flag].group = options
    return app


def _run(verb: str, words: list[str]) -> int:
    from cyclopts import CycloptsError

    app = _app(name=f"{_NAME} {verb}", help=f"{VERBS[verb][0].upper()}{VERBS[verb][1:]}.", version_flags=())
    app["--help"].group = "Parameters"
    app.default(importlib.import_module(f"{__name__}.{verb}").run)
    try:
        return int(app(words) or 0)
    except CycloptsError as error:
        raise ValueError(_complaint(app, error)) from error


def _complaint(app: App, error: CycloptsError) -> str:
    """What is wrong with the words of a verb; where it is the words rather than a value, also how it is called."""
    from cyclopts.exceptions import MissingArgumentError
    from pydantic import ValidationError
    from rich.console import Console

    from moduleformer_ext.records import complaint

    if isinstance(error.__cause__, ValidationError):
        field, problem = complaint(error.__cause__)
        return f"--{field.replace('_', '-')} {problem}" if field else problem
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        message = f"{error.argument.name} must be given a value."
    else:
        message = str(error)
    help_text = io.StringIO()
    app.help_print([], console=Console(file=help_text, width=1000))
    return f"{message} {help_text.getvalue().splitlines()[0].rstrip()}; see --help"


def _expected(error: Exception) -> str | None:
    """What a user can be told of an error in one line; None for a fault of the program."""
    match error:
        case ValueError() | OSError() | FloatingPointError() | ImportError():
            return " ".join(str(error).split("\n"))
        case MemoryError():
            return "there is not enough memory"
        case RuntimeError() if "allocate" in str(error):
            return f"there is not enough memory: {str(error).splitlines()[0]}"
    return None
