"""Checkpoint directories `step-N`: written whole or not at all, older ones removed once a newer is safe."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moduleformer_ext.distributed import ALONE, Processes
from moduleformer_ext.files import new_directory, remove_directory, remove_partial

if TYPE_CHECKING:
    from moduleformer_ext.distributed.checkpoint import BackgroundWrite

Write = Callable[[Path], "BackgroundWrite | None"]


class _Pending(NamedTuple):
    path: Path
    background: "BackgroundWrite | None"
    scratch: ExitStack
    """On the first process, what makes the scratch directory the checkpoint."""
    processes: Processes


class CheckpointStore:
    """The checkpoints of one run, in one folder."""

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.root = root
        self.keep = keep
        self._pending: _Pending | None = None

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

    def save(self, step: int, write: Write, processes: Processes = ALONE) -> Path:
        """Let `write` fill a scratch directory and make it the checkpoint of `step`; all processes together.

        Killed at any moment, this leaves the checkpoints before it untouched, and the new one whole or absent. Where
        `write` goes on in the background, the checkpoint appears with the first :meth:`poll` after its end, or with
        :meth:`finish`, which the next save begins with.
        """
        self.finish()
        path = self._path(step)
        stack = ExitStack()

        def begin() -> Path | None:
            self.root.mkdir(parents=True, exist_ok=True)
            remove_partial(self.root)
            self._remove_old()  # what a kill between writing and removing left
            return None if path.exists() else stack.enter_context(new_directory(path))

        with stack:
            scratch = processes.first(begin)
            background = None if scratch is None else processes.together(lambda: write(scratch))
            self._pending = _Pending(path, background, stack.pop_all(), processes)
        if background is None:
            self.finish()
        return path

    def poll(self) -> None:
        """Finish what all processes have written in the background; all processes together."""
        pending = self._pending
        if pending is None or pending.background is None:
            return
        if pending.processes.largest(float(not pending.background.done())) == 0:
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is there; all processes together."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with pending.scratch as scratch:
                if pending.background is not None:
                    pending.processes.together(pending.background.wait)
                pending.processes.first(scratch.pop_all().close)
            pending.processes.first(self._remove_old)

    def _remove_old(self) -> None:
        for old in self.steps()[: -self.keep]:
            remove_directory(self._path(old))

    def _path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"
