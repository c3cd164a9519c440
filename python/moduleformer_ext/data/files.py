"""Durable, all-or-nothing writes: what a reader finds under a final name is always complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL_PREFIX = ".partial-"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8) atomically and durably."""
    payload = content.encode() if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(prefix=_PARTIAL_PREFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes it private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a scratch directory that becomes `path`, which must not exist, when the block ends well.

    Every file is flushed to disk before the rename, so a crash at any moment leaves either no `path`
    or a complete one.
    """
    scratch = Path(tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, dir=path.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp makes it private
        yield scratch
        for folder, _, names in os.walk(scratch, topdown=False):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        os.rename(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    _sync(path.parent)


def remove_directory(path: Path) -> None:
    """Delete `path` such that a crash half-way leaves nothing under its name."""
    doomed = Path(tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, dir=path.parent))
    os.rename(path, doomed / path.name)
    shutil.rmtree(doomed)


def remove_partial(parent: Path) -> None:
    """Delete what writers killed half-way left in `parent`."""
    for leftover in parent.glob(f"{_PARTIAL_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
