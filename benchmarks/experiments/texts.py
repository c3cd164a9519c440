"""The texts: what models are trained on first, and the languages that they meet later.

The old domains are the standard library's code and prose. A new language is the translated messages of two Python
packages, which every machine that reaches PyPI can have; the messages of one source file are one document, so that the
held-out split is by file. The user's own folders can stand in for either.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import polib

from moduleformer_ext.data import Dataset, Document, build_dataset, open_dataset, standard_library, text_files

PACKAGES = ("pretix==2026.8.0", "plone.app.locales==7.0.4")
"""Wheels with message catalogues of whole sentences in many languages. Only read, never installed."""
LANGUAGES = {"german": "de", "vietnamese": "vi"}
_HELD_OUT = 0.05
_SHORTEST = 20
"""Messages of fewer characters are labels, not text."""


def old_dataset(out: Path, sources: Sequence[str], vocab_size: int) -> Dataset:
    """The domains of the first training; their tokenizer serves all experiments."""
    path = out / f"old-{vocab_size}"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        documents = text_files(sources) if sources else standard_library()
        build_dataset(path, documents, vocab_size=vocab_size, held_out_fraction=_HELD_OUT)
    return open_dataset(path)


def new_dataset(out: Path, sources: Sequence[str], old: Dataset) -> Dataset:
    """The domains that come later, in the tokens of the old ones."""
    vocab_size = old.tokenizer.get_vocab_size()
    path = out / f"new-{vocab_size}"
    if not path.exists():
        documents = text_files(sources) if sources else catalogue_documents(out / "packages")
        build_dataset(path, documents, vocab_size=vocab_size, held_out_fraction=_HELD_OUT, tokenizer=old.tokenizer)
    return open_dataset(path)


def catalogue_documents(folder: Path) -> list[Document]:
    """The messages of `PACKAGES` in every language of `LANGUAGES`, downloaded to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    subprocess.run([*pip, *PACKAGES], check=True)
    return [
        Document(language, name, text)
        for language, code in LANGUAGES.items()
        for name, text in sorted(_messages_by_file(sorted(folder.glob("*.whl")), code).items())
    ]


def _messages_by_file(wheels: Sequence[Path], code: str) -> dict[str, str]:
    """Name of a source file -> the translations of its messages, each message once."""
    seen: set[str] = set()
    messages: dict[str, list[str]] = defaultdict(list)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".po") and f"/{code}/" in name]
            for name in sorted(names):
                for entry in _entries(archive.read(name).decode()):
                    file = entry.occurrences[0][0] if entry.occurrences else name
                    for text in [entry.msgstr, *entry.msgstr_plural.values()]:
                        if len(text) >= _SHORTEST and text not in seen and text != entry.msgid:
                            seen.add(text)
                            messages[f"{wheel.stem.split('-')[0]}/{file}"].append(text)
    return {name: "\n\n".join(texts) + "\n" for name, texts in messages.items()}


def _entries(catalogue: str) -> list[polib.POEntry]:
    return [e for e in polib.pofile(catalogue) if e.translated() and not e.obsolete]
