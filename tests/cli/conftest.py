"""A small corpus and a small run on it."""

from pathlib import Path

import pytest
import torch
from tiny import FLAGS, TINY

from moduleformer_ext.cli import main


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        words = " ".join(f"word{number * index % 11}" for index in range(50))
        (folder / f"{number}.txt").write_text(f"{words}\n")
    return folder


@pytest.fixture(scope="session")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--run", str(root), "--text", f"words={corpus}", "--model", *TINY, *FLAGS]) == 0
    return root


@pytest.fixture(autouse=True)
def no_width_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests say how wide a terminal is; pytest-xdist says it to its workers, too."""
    monkeypatch.delenv("COLUMNS", raising=False)
