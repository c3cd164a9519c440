"""What people look at: tables, and the progress of long work. On a terminal of any width, and in files and pipes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

_UNBOUNDED = 10_000
_NARROW = 60
"""Columns below which a progress bar shows no more than how far it is."""
_LOG_SECONDS = 15.0
"""Between lines about progress where there is no terminal."""


def table(columns: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    """Rows under titles, for standard output: numbers to the right, everything else to the left, None as nothing.

    On a terminal that is too narrow for it, each row is a list of `title value` lines instead. What is not a terminal
    gets whole lines without lines drawn around them.
    """
    console = _standard_output()
    style = box.SIMPLE_HEAD if console.is_terminal else None
    drawn = Table(box=style, pad_edge=False, show_edge=False, header_style="bold")
    for index, title in enumerate(columns):
        numbers = all(
            isinstance(row[index], (int, float)) or row[index] is None or _is_number(row[index]) for row in rows
        )
        drawn.add_column(Text(title), justify="right" if numbers and rows else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(_shown(value)) for value in row))
    with console.capture() as capture:
        if Measurement.get(console, console.options.update(width=_UNBOUNDED), drawn).maximum <= console.width:
            console.print(drawn)
        else:
            for row in rows:
                for title, value in zip(columns, row, strict=True):
                    console.print(Text.assemble((f"{title} " if title else "", "bold"), _shown(value)))
                console.print()
    return _stripped(capture.get())


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Names and values, a pair a line; on a terminal long values go on in further lines."""
    console = _standard_output()
    drawn = Table.grid(Column(no_wrap=True, style="bold"), Column(overflow="fold"), padding=(0, 2, 0, 0))
    for name, value in pairs:
        drawn.add_row(Text(name), Text(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)))
    with console.capture() as capture:
        console.print(drawn)
    return _stripped(capture.get())


def _standard_output() -> Console:
    """As wide as the terminal; what is none has no end of a line."""
    console = Console(emoji=False, markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNBOUNDED
    return console


def _stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def _is_number(value: object) -> bool:
    """Whether a text is a figure that was formatted already."""
    try:
        float(str(value).rstrip("%x "))
    except ValueError:
        return False
    return True


def _shown(value: str | float | None) -> str:
    return "" if value is None else str(value)


class Bar(Protocol):
    """The progress of one piece of work."""

    def advance(self, amount: int, note: str = "") -> None:
        """So much more is done; `note` says how it is going."""


@contextmanager
def progress(title: str, total: int, completed: int = 0, *, keep: bool = True, silent: bool = False) -> Iterator[Bar]:
    """A bar on standard error while the block runs, and after it with `keep`; where that is no terminal, a line every
    quarter of a minute; `silent`, as for all processes but the first, nothing.
    """
    if silent:
        yield _Nothing()
        return
    console = Console(stderr=True, markup=False, highlight=False)
    if not console.is_terminal:
        yield _LogLines(title, total, completed)
        return
    wide = console.width >= _NARROW
    columns = [
        TextColumn("{task.description}", markup=False),
        *([BarColumn(bar_width=None)] if wide else []),
        TaskProgressColumn(),
        *([MofNCompleteColumn(), TimeRemainingColumn(compact=True)] if wide else []),
    ]
    note = TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    with Progress(*columns, *([note] if wide else []), console=console, expand=wide, transient=not keep) as bars:
        yield _RichBar(bars, title, total, completed)


class _Nothing:
    def advance(self, amount: int, note: str = "") -> None: ...


class _RichBar:
    def __init__(self, bars: Progress, title: str, total: int, completed: int) -> None:
        self._bars = bars
        self._task = bars.add_task(title, total=total, completed=completed, note="")

    def advance(self, amount: int, note: str = "") -> None:
        self._bars.update(self._task, advance=amount, note=note)


class _LogLines:
    def __init__(self, title: str, total: int, completed: int) -> None:
        self._title, self._total, self._completed = title, total, completed
        self._last = time.monotonic()

    def advance(self, amount: int, note: str = "") -> None:
        self._completed += amount
        now = time.monotonic()
        if now - self._last >= _LOG_SECONDS:
            self._last = now
            words = f"{self._title}: {self._completed} of {self._total}{', ' if note else ''}{note}"
            print(words, file=sys.stderr, flush=True)
