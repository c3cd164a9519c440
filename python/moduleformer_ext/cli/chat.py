"""`moduleformer-ext chat`."""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tokenizers import Tokenizer

from moduleformer_ext.cli import sampling
from moduleformer_ext.cli.source import Model, Switch, load_source
from moduleformer_ext.data import encode_texts, end_of_text_id
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.records import Count

_HINT = "Ctrl-C ends an answer, Ctrl-D the chat; /reset forgets what was said. Models know text alone: begin one."
_RESET = "/reset"


class Options(sampling.Sampling):
    """How to answer."""

    one_line: Switch = False
    """an answer ends with its line"""
    remember: Count = 4096
    """tokens of what was said that a model still reads"""


def run(source: Model, /, *, options: Options = Options()) -> int:
    """Read a message, write what the model has to say after it, and so on. To a model, a chat is its messages, one a
    line.
    """
    model, tokenizer = load_source(source, options.device, options.dtype)
    end = end_of_text_id(tokenizer)
    said = [end]
    turn = 0
    with _Interrupts() as interrupts, _history():
        if sys.stdin.isatty():
            print(_HINT)
        while (message := _read(interrupts)) is not None:
            if message.strip() == _RESET:
                said = [end]
            elif message:
                said += encode_texts(tokenizer, [f"{message}\n"])[0]
                seed = None if options.seed is None else options.seed + turn
                said += _answer(interrupts, model, tokenizer, said[-options.remember :], options, seed)
                turn += 1
    return 0


class _Interrupts:
    """While open, Ctrl-C interrupts only what runs under `heard`, and that once: a second one finds nothing to end."""

    def __init__(self) -> None:
        self._heard = False

    def __enter__(self) -> "_Interrupts":
        self._own = threading.current_thread() is threading.main_thread()  # only it may set handlers
        if self._own:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._own:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._heard:
            self._heard = False
            raise KeyboardInterrupt

    @contextmanager
    def heard(self) -> Iterator[None]:
        self._heard = True
        try:
            yield
        finally:
            self._heard = False


def _read(interrupts: _Interrupts) -> str | None:
    """The next message; None at the end, nothing for what is no message."""
    try:
        with interrupts.heard():
            message = input("> " if sys.stdin.isatty() else "")
        message.encode()
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
    except KeyboardInterrupt:
        print()
        return ""
    except UnicodeError:
        print("messages must be UTF-8 text", file=sys.stderr)
        return ""
    return message


def _answer(
    interrupts: _Interrupts,
    model: MoLMForCausalLM,
    tokenizer: Tokenizer,
    said: list[int],
    options: Options,
    seed: int | None,
) -> list[int]:
    """Write an answer as it comes, until Ctrl-C at the latest; returns its tokens, a line's end the last."""
    text, tokens, written = sampling.Text(tokenizer), list[int](), ""
    try:
        with interrupts.heard():
            for token in options.stream(model, said, end_of_text_id(tokenizer), seed):
                tokens.append(token)
                piece = text.add(token)
                written += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
                if options.one_line and "\n" in written.lstrip():
                    break
    except KeyboardInterrupt:
        pass
    if not written.endswith("\n"):
        print(flush=True)
        tokens += encode_texts(tokenizer, ["\n"])[0]
    return tokens


@contextmanager
def _history() -> Iterator[None]:
    """Line editing with the messages of earlier chats, where Python has readline."""
    try:
        readline = importlib.import_module("readline")
    except ImportError:  # not on Windows
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = state / "moduleformer-ext" / "chat_history"
    readline.set_history_length(1000)
    if file.is_file():
        readline.read_history_file(file)
    try:
        yield
    finally:
        if sys.stdin.isatty():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(file)
            except OSError as error:
                print(f"the history cannot be kept in '{file}': {error}", file=sys.stderr)
