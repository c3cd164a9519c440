"""Runs the fenced blocks of a page: Python as it stands, of the shell the lines that call moduleformer-ext."""

import shlex
from pathlib import Path

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from moduleformer_ext.cli import main

ROOT = Path(__file__).parents[2]


def run_commands(example: Example) -> str | None:
    """What went wrong, if anything did."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] != "moduleformer-ext":
            return f"{words[0]} is not run here: indent what is not to run, or leave out the language"
        if words and (status := main(words[1:])) != 0:
            return f"{shlex.join(words)}: exit status {status}"
    return None


def run_page(path: Path) -> int:
    """How many blocks there were; each sees the names of those before it."""
    parsers = [PythonCodeBlockParser(), CodeBlockParser("sh", run_commands), SkipParser()]
    document = Sybil(parsers, path=str(ROOT)).parse(path)
    examples = list(document.examples())
    for example in examples:
        example.evaluate()
    return len(examples)
