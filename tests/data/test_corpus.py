from pathlib import Path

import pytest

from moduleformer_ext.data import Document, text_files
from moduleformer_ext.data.corpus import separate_docstrings

SOURCE = '''"""Module text."""
import os


class Thing:
    """Class text

    on lines.
    """

    def act(self):
        "Short."
        return os.name
'''


def test_docstrings_are_separated_from_code() -> None:
    code, prose = separate_docstrings(SOURCE)
    assert prose == "Module text.\n\nClass text\n\non lines.\n\nShort."
    assert code == "import os\n\n\nclass Thing:\n    def act(self):\n        return os.name\n"


def test_source_that_does_not_parse_is_all_code() -> None:
    assert separate_docstrings("print 'old'\n") == ("print 'old'\n", "")


def test_standard_library_has_both_domains_and_no_paragraph_twice(library: list[Document]) -> None:
    assert {document.domain for document in library} == {"code", "prose"}
    assert sum(len(document.text) for document in library) > 3_000_000
    paragraphs = [
        " ".join(paragraph.split())
        for document in library
        if document.domain == "prose"
        for paragraph in str(document.text).split("\n\n")
        if paragraph.strip()
    ]
    assert len(paragraphs) == len(set(paragraphs))


def test_text_files_reads_folders_and_names_domains(tmp_path: Path) -> None:
    (tmp_path / "books" / "deep").mkdir(parents=True)
    (tmp_path / "books" / "a.txt").write_text("one")
    (tmp_path / "books" / "deep" / "b.md").write_text("two")
    (tmp_path / "books" / "copy.txt").write_text("one")
    (tmp_path / "books" / ".hidden").write_text("no")
    (tmp_path / "books" / "binary").write_bytes(b"\0\1")
    (tmp_path / "books" / "latin").write_bytes(b"\xe9\xe8")
    (tmp_path / "note.txt").write_text("three")
    documents = text_files([str(tmp_path / "books"), f"notes={tmp_path / 'note.txt'}"])
    assert [(document.domain, document.name, str(document.text)) for document in documents] == [
        ("books", "a.txt", "one"),
        ("books", "deep/b.md", "two"),
        ("notes", "note.txt", "three"),
    ]


def test_a_run_inside_the_texts_is_left_out(tmp_path: Path) -> None:
    for folder in ("texts", "texts/run"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    documents = text_files([str(tmp_path / "texts")], without=tmp_path / "texts" / "run")
    assert [str(document.text) for document in documents] == ["texts"]


def test_a_domain_that_only_repeats_others_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="domain 'b' must have text of its own"):
        text_files([f"a={tmp_path}", f"b={tmp_path}"])


def test_missing_and_empty_sources_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist"):
        text_files([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="no non-empty UTF-8 text file found"):
        text_files([str(tmp_path)])
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match=r"domain name takes letters"):
        text_files([f"a/b={tmp_path}"])


def test_a_document_in_memory_has_a_text_like_one_that_is_stored() -> None:
    document = Document(domain="d", name="n", text="é")
    assert (str(document.text), len(document.text)) == ("é", 2)
    assert Document("d", "n", document.text) == document == Document("d", "n", "é")
