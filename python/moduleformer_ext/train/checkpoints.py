"""Checkpoint directories `step-N`: written whole or not at all, older ones removed once a newer is safe."""

import re
from collections.abc import Callable
from pathlib import Path

from moduleformer_ext.files import new_directory, remove_directory, remove_partial


class CheckpointStore:
    """The checkpoints of one run, in one folder."""

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.root = root
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        if not self.root.is_dir():
            return []
        matches = (re.fullmatch(r"step-(\d+)", path.name) for path in self.root.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Path | None:
        """Newest checkpoint, or None."""
        steps = self.steps()
        return self._path(steps[-1]) if steps else None

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a scratch directory and make it the checkpoint of `step`.

        Killed at any moment, this leaves the checkpoints before it untouched, and the new one whole or absent.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        remove_partial(self.root)
        self._remove_old()  # what a kill between writing and removing left
        path = self._path(step)
        if not path.exists():
            with new_directory(path) as scratch:
                write(scratch)
        self._remove_old()
        return path

    def _remove_old(self) -> None:
        for old in self.steps()[: -self.keep]:
            remove_directory(self._path(old))

    def _path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"
