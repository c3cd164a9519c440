"""The examples run, one after another from one trained model, and say what they should."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "tiny_model": "prose: ",
    "usage": "ffn experts: KL(prose || code) by layer",
    "prune": "keeps",
    "extract_domain": "with the part for prose",
    "concentrate": "concentrated with weight 0.2: ",
    "extend": "new text: ",
    "compare": "only in the second: 4",
    "merge": "only in the second: 4, 5",
    "hf_generate": "beam search: ",
    "hf_train": "new text: ",
    "hf_lora": "new text: ",
    "hf_experts": "the same tokens: True",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them run: the first trains the model."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("examples")


def test_every_example_is_known() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example_runs(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("transformers", "peft") if name.startswith("hf_") else ():
        pytest.importorskip(package)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out
