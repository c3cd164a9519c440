"""Peers that cannot share our environment, each in a process of the Python that has it (`--peer-python KIND=PYTHON`).

The process (`served.py`) gets the inputs as files and is told to compute in a contestant's turn, so that its rounds
alternate with ours; what a call took it says itself, by the same clocks.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..race import Contestant, Outputs

KINDS = ("ggml", "kt-kernel")
_PROGRAM = Path(__file__).with_name("served.py")


def version(python: str, kind: str) -> str:
    """Of a peer, as it says itself."""
    answer = subprocess.run([python, str(_PROGRAM), kind], capture_output=True, text=True)
    if answer.returncode != 0:
        return "not found"
    said = answer.stdout.strip().splitlines()
    return said[-1] if said else "of unknown version"


class Apart:
    """Gated experts on the inputs of one race: gate, up [E, F, D], down [E, D, F], x [T, D], ids, weights [T, K]."""

    def __init__(self, python: str, kind: str, precision: str, threads: int, inputs: Mapping[str, Tensor]) -> None:
        self._command = [python, str(_PROGRAM), kind, precision, str(threads)]
        self._inputs = inputs
        self._process: subprocess.Popen[str] | None = None
        self._took: dict[str, float] = {}

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        for name, tensor in self._inputs.items():
            array = tensor.detach().to(torch.float32 if tensor.is_floating_point() else torch.int32)
            np.save(Path(self._folder.name) / f"{name}.npy", array.contiguous().numpy())
        with self._said.open("w") as said:
            command, pipe = [*self._command, self._folder.name], subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True)
        self._answer()

    @property
    def _said(self) -> Path:
        return Path(self._folder.name) / "said.txt"

    def _answer(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            said = self._said.read_text().strip().splitlines()
            why = said[-1] if said else "nothing"
            raise RuntimeError(f"its process ended with status {code} and said: {why}")
        self._took = json.loads(line)

    def run(self) -> Outputs:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        if self._process.poll() is None:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        self._answer()
        return {"y": torch.from_numpy(np.load(Path(self._folder.name) / "y.npy"))}

    def clocks(self) -> dict[str, float]:
        """What the last call took."""
        return self._took

    def contestant(self, name: str) -> Contestant:
        return Contestant(name, self.run, clocks=self.clocks)

    def close(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()
