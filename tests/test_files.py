import os
from pathlib import Path

import pytest

from moduleformer_ext.files import new_directory, remove_directory, remove_partial, write_file


def test_write_file_replaces(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "one")
    write_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a"]


def test_new_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with new_directory(tmp_path / "d") as scratch:
            (scratch / "file").write_text("half")
            assert not (tmp_path / "d").exists()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    assert not list(tmp_path.iterdir())
    with new_directory(tmp_path / "d") as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "file").write_text("whole")
    assert (tmp_path / "d" / "sub" / "file").read_text() == "whole"
    assert os.listdir(tmp_path) == ["d"]


def test_remove(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").write_text("x")
    remove_directory(tmp_path / "d")
    assert not list(tmp_path.iterdir())
    (tmp_path / ".partial-dir").mkdir()
    (tmp_path / ".partial-file").write_text("x")
    remove_partial(tmp_path)
    assert not list(tmp_path.iterdir())
