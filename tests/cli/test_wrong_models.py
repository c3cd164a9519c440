"""Directories that are no model, or only a part of one: each is said what it is and what to name instead."""

import json
import shutil
from pathlib import Path

import pytest

from moduleformer_ext.cli import main


@pytest.fixture
def model(run: Path, tmp_path: Path) -> Path:
    """A published directory to damage."""
    assert main(["convert", str(run), str(tmp_path / "model"), "--to", "published", "--max-shard-size", "40KB"]) == 0
    return tmp_path / "model"


def _complaint(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def _fields(model: Path, **fields: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **fields}))


def _lose_a_shard(model: Path) -> None:
    min(model.glob("model-*.safetensors")).unlink()


def _lose_the_weights(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()


def _adapter(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: _fields(model, model_type="gpt2"), "model_type must be 'moduleformer', got 'gpt2'"),
        (
            lambda model: _fields(model, quantization_config={"quant_method": "bitsandbytes"}),
            "quantization_config must be absent, got 'bitsandbytes'; transformers reads quantised weights",
        ),
        (
            lambda model: _fields(model, hidden_size=8),
            "n_embd and hidden_size are names of one field and must agree, got 16 and 8",
        ),
        (_lose_a_shard, "model.safetensors.index.json names model-00001-of-"),
        (_lose_the_weights, "has none of model.safetensors, pytorch_model.bin"),
        (lambda model: (model / "tokenizer.json").unlink(), "expected a tokenizer.json, or a folder with one or with"),
        (_adapter, "is an adapter of peft, not a model; merge it into its model"),
        (lambda model: (model / "config.json").unlink(), "is neither a run nor a model directory (no config.json)"),
    ],
)
def test_damaged_directories(damage, message: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(model)
    assert message in _complaint(["generate", str(model), "--prompt", "x"], capsys)


def test_names_of_something_else(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights.gguf").write_text("x")
    for name, message in (
        (str(tmp_path / "weights.gguf"), "is a file; name the folder that holds config.json and the weights"),
        (str(tmp_path / "none"), "none' does not exist"),
        ("ibm/MoLM-350M-4B", "does not exist; a model of the Hugging Face Hub comes with: hf download ibm/MoLM-350M"),
        (str(run / "data"), f"it belongs to the run '{run}', name that"),
    ):
        line = _complaint(["eval", name], capsys)
        assert message in line
        assert ("hf download" in line) == name.startswith("ibm/")


def test_a_checkpoint_of_a_run_is_a_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = sorted((run / "checkpoints").iterdir())
    texts = []
    for source in (run, checkpoints[-1]):
        assert main(["generate", str(source), "--prompt", "word1", "--temperature", "0", "--max-new-tokens", "5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    scores = []
    for source in (run, checkpoints[-1], checkpoints[0]):
        assert main(["eval", str(source), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[1] != scores[2]


def test_a_run_that_lost_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    (broken / "data" / "train.words.npy").unlink()
    assert "train.words.npy' does not exist; the run's data is not whole" in _complaint(["eval", str(broken)], capsys)


def test_a_vocabulary_beside_the_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--run", str(tmp_path / "run"), "--steps", "1", "--model", "vocab_size=3"]
    assert "vocab_size must be left out" in _complaint(words, capsys)
    assert not (tmp_path / "run").exists()


def test_a_config_of_ours_that_contradicts_itself(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    assert main(["convert", str(run), str(own)]) == 0
    _fields(own, num_experts=3)
    assert "n_mlp_experts and num_experts are names of one field and must agree, got 8 and 3" in _complaint(
        ["generate", str(own), "--prompt", "x"], capsys
    )
    _fields(own, num_experts=8)
    assert main(["generate", str(own), "--prompt", "x", "--max-new-tokens", "1"]) == 0
