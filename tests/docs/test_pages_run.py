"""The code that pages show runs as it stands."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("sybil")

from pages import ROOT, run_page


@pytest.mark.parametrize(("page", "blocks"), [("tutorial.md", 11), ("drop_ins.md", 10)])
def test_page_runs(page: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    assert run_page(ROOT / "docs" / page) >= blocks
