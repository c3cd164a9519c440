"""A small run on the small corpus."""

from pathlib import Path

import pytest
import torch
from tiny import FLAGS, TINY

from moduleformer_ext.cli import main


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
