import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moduleformer_ext.files import (
    load_tensors,
    new_directory,
    read_json,
    remove_directory,
    remove_partial,
    save_tensors,
    write_file,
)


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


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", "x")
        save_tensors(tmp_path / "tensors", {"a": torch.ones(2)}, {"b": "c"})
        with new_directory(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"file": 0o640, "tensors": 0o640, "folder": 0o750}


def test_tensors_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2).T, "c": torch.arange(3)}
    metadata = dict.fromkeys("fedcba", 'é\n"x"\x01')
    contents = set()
    for _ in range(6):
        save_tensors(tmp_path / "t", tensors, metadata)
        contents.add((tmp_path / "t").read_bytes())
    assert len(contents) == 1
    loaded = load_tensors(tmp_path / "t")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "t", framework="pt") as file:
        assert file.metadata() == metadata


FULL = """
import resource, signal, sys, torch
from pathlib import Path
from moduleformer_ext.files import replacing, save_tensors, write_file

def save(path):
    with replacing(path) as scratch:
        save_tensors(scratch, {"a": torch.ones(5000)})

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the next best thing to a full disk
for write in (save, lambda path: write_file(path, bytes(5000))):
    try:
        write(Path(sys.argv[1]))
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs limits of file sizes")
def test_a_full_disk_leaves_the_file_before(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"before")
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "t")], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"'{tmp_path / 't'}' cannot be written: ") for line in lines)
    assert ".partial" not in result.stdout
    assert (tmp_path / "t").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_json_is_checked_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, message in (
        (b"{", r"a\.json': is not valid JSON"),
        (b"\xff", r"a\.json' is not UTF-8 text"),
        (b"[1]", r"a\.json': must be an object"),
        (b'{"x": "1"}', r"a\.json': x must be a valid integer"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_json(path, dict[str, int])
    path.write_text('{"x": 1}', encoding="utf-8-sig")
    assert read_json(path, dict[str, int]) == {"x": 1}
