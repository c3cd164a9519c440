"""Documents to train on: the user's text files, or the code and the prose that come with every Python."""

import ast
import hashlib
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from moduleformer_ext.data.formats import FIELD, check_packages, dataset_files, read_texts, stem
from moduleformer_ext.data.texts import StoredText, TextStore

# Tests are not part of every installation; the others are tables or generated text rather than code.
_SKIPPED_FOLDERS = {
    "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests", "__pycache__"
}  # fmt: skip
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


ALL = "all"
"""Stands for all domains together, wherever results are listed by domain; no domain has this name."""


STANDARD_DOMAINS = ("code", "prose")
"""Of `standard_library`."""


@dataclass(frozen=True, init=False)
class Document:
    """One text of a domain. `name` is relative to its root, and alone decides the split it falls into.

    `str(document.text)` is all of the text; `document.text.pieces()` what fits into memory.
    """

    domain: str
    name: str
    text: StoredText

    def __init__(self, domain: str, name: str, text: str | StoredText) -> None:
        vars(self).update(domain=domain, name=name, text=StoredText.of(text))


def standard_library() -> list[Document]:
    """Return the running Python's standard library as two domains.

    `code` is the source without its docstrings; `prose` is the docstrings, one document per source file, and
    the language reference in `pydoc_data.topics`. A file's code and docstrings share a name, hence a split.
    """
    code, prose = [], []
    for name, source in _library_sources(Path(sysconfig.get_path("stdlib"))):
        body, docstrings = separate_docstrings(source)
        code.append(Document("code", name, body))
        prose.append(Document("prose", name, docstrings))
    prose += [Document("prose", f"topics/{name}", text) for name, text in sorted(topics.items())]
    return _distinct([*code, *_without_repeated_paragraphs(prose)])


def library_fingerprint() -> str:
    """What `standard_library` returns, in a line: as long as this is the same, so are the documents."""
    root = Path(sysconfig.get_path("stdlib"))
    digest = hashlib.sha256(sys.version.encode())
    for path in (Path(__file__), *_library_files(root)):
        status = path.stat()
        digest.update(os.fsencode(f"{path} {status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()


def _library_files(root: Path) -> list[Path]:
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    ]


def _library_sources(root: Path) -> Iterator[tuple[str, str]]:
    for path in _library_files(root):
        try:
            with tokenize.open(path) as file:  # honours the coding declared in the source
                yield path.relative_to(root).as_posix(), file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and samples of broken source


def separate_docstrings(source: str) -> tuple[str, str]:
    """Split Python `source` into the code without docstrings and the dedented docstrings in file order.

    The blank lines that follow a docstring go with it: code would otherwise have more of them than anybody writes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source, ""
    found: list[tuple[int, int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)) is not None:
            statement = node.body[0]
            found.append((statement.lineno, statement.end_lineno or statement.lineno, text))
    found.sort()
    lines = source.splitlines(keepends=True)
    removed: set[int] = set()
    for first, last, _ in found:
        while last < len(lines) and not lines[last].strip():  # `last` counts from 1: the line after
            last += 1
        removed.update(range(first, last + 1))
    code = "".join(line for number, line in enumerate(lines, start=1) if number not in removed)
    return code, "\n\n".join(text for _, _, text in found)


def _without_repeated_paragraphs(documents: Sequence[Document]) -> list[Document]:
    """Keep each paragraph only in the longest document that has it.

    Topics quote one another at length ("compound" holds "if", "for", ...): without this the held-out topics
    would be found in the training split.
    """
    seen: set[str] = set()
    kept: dict[int, Document] = {}
    for index in sorted(range(len(documents)), key=lambda i: (-len(str(documents[i].text)), i)):
        document, paragraphs = documents[index], []
        for paragraph in re.split(r"\n{2,}", str(document.text)):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        kept[index] = Document(document.domain, document.name, "\n\n".join(paragraphs))
    return [kept[index] for index in range(len(documents))]


def _distinct(documents: Iterable[Document]) -> list[Document]:
    """Drop blank documents and those whose text came before: a copy might fall into the other split."""
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        if not document.text.is_blank() and (digest := document.text.digest()) not in seen:
            seen.add(digest)
            kept.append(document)
    return kept


def text_files(
    sources: Sequence[str], *, field: str = FIELD, without: Path | None = None, scratch: Path | None = None
) -> list[Document]:
    """Read text files and folders (recursively, hidden entries aside) as documents.

    Their texts wait in a file without a name in the folder `scratch` (default: that of temporary files), which takes as
    much of its disk as they have bytes; memory holds their names.

    Each source is `PATH` or `DOMAIN=PATH`; without a name the domain is the stem of the path. JSON lines, Parquet,
    Arrow and datasets that Hugging Face's library saved have a document per record, its text in `field`. Files that
    are not UTF-8 text, empty files, repeated contents and what is in the folder `without` are left out. A source
    without any text, an archive as a source and a damaged file are errors.
    """
    store = TextStore(scratch)
    documents: list[Document] = []
    for source in sources:
        domain, root = _parse_source(source)
        found = []
        for path in _files_below(root, without):
            name = path.name if path == root else path.relative_to(root).as_posix()
            texts = read_texts(path, store, field, named=path == root)
            found += [Document(domain, f"{name}{part}", text) for part, text in texts]
        if not found:
            raise ValueError(f"text: no non-empty UTF-8 text file found at '{root}'")
        documents += found
    distinct = _distinct(documents)
    if repeated := {document.domain for document in documents} - {document.domain for document in distinct}:
        raise ValueError(f"text: domain '{min(repeated)}' must have text of its own, got repetitions of others' alone")
    return distinct


def check_source(source: str) -> str:
    """Refuse what names no path, such as an unset variable of the shell, which would be the current folder."""
    if not source or source.endswith("="):
        raise ValueError(f"must be PATH or DOMAIN=PATH, got '{source}'; write . for the current folder")
    return source


def check_sources(sources: Sequence[str]) -> set[str]:
    """Refuse sources that do not exist, that need a package which is not installed, or whose domain has no proper
    name; return the domains. No text is read.
    """
    domains = set()
    for source in sources:
        domain, root = _parse_source(source)
        domains.add(domain)
        for path in _files_below(root):
            check_packages(path)
    return domains


def _parse_source(source: str) -> tuple[str, Path]:
    check_source(source)
    name, separator, location = source.partition("=")
    if separator and not Path(source).exists():
        domain, root = name, Path(location)
    else:
        root = Path(source)
        domain = stem(Path(os.path.realpath(root)))
    if not root.exists():
        raise FileNotFoundError(f"text: '{root}' does not exist; expected a text file or a folder of text files")
    if not re.fullmatch(r"[\w.+-]+", domain):
        raise ValueError(
            f"text: a domain name takes letters, digits and ._+- but '{source}' gives '{domain}'; write NAME=PATH"
        )
    if domain == ALL:
        raise ValueError(f"text: '{ALL}' stands for all domains together, but '{source}' gives it; write NAME=PATH")
    return domain, root


def _files_below(root: Path, without: Path | None = None) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    left_out = None if without is None else Path(os.path.realpath(without))
    for folder, folders, names in os.walk(root):
        here = Path(os.path.realpath(folder))
        if left_out is not None and (here == left_out or left_out in here.parents):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        shards = dataset_files(Path(folder))
        for name in sorted(names if shards is None else shards):
            if not name.startswith(".") and Path(folder, name).is_file():
                yield Path(folder, name)
