"""What training and evaluation read: records, compressed texts, tokenizers from elsewhere, published models."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import FLAGS, TINY
from tokenizers import Tokenizer

from moduleformer_ext.cli import main
from moduleformer_ext.data import END_OF_TEXT, load_tokenizer
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM

TEXTS = [" ".join(f"word{number * index % 11}" for index in range(50)) for number in range(12)]
WITHOUT_VOCABULARY = [word for word in FLAGS if word not in ("--vocab-size", "270")]
STEP = ["--batch-size", "2", "--segment-length", "12", "--history-length", "20", "--steps", "1", "--dtype", "fp32"]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "words.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps({"body": text}) for text in TEXTS).encode()))
    return path


@pytest.fixture
def slow_tokenizer(run: Path, tmp_path: Path) -> Path:
    """The run's tokenizer as vocab.json, merges.txt and added_tokens.json."""
    folder = tmp_path / "slow"
    folder.mkdir()
    model = json.loads((run / "data" / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "added_tokens.json").write_text(json.dumps({"   ": len(model["vocab"])}))
    return folder


def test_train_and_eval_on_records(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "run"
    words = ["train", "--run", str(root), "--text", str(lines), "--text-field", "body", "--model", *TINY, *FLAGS]
    assert main(words) == 0
    index = json.loads((root / "data" / "index.json").read_text())
    assert sum(index[split]["words"]["num_documents"] for split in ("train", "held_out")) == len(set(TEXTS))
    capsys.readouterr()
    words = ["eval", str(root), "--json", "--text", str(lines)]
    assert main(words) == 2
    assert "the field 'text', got body; name one with --text-field" in capsys.readouterr().err
    assert main([*words, "--text-field", "body"]) == 0
    domains = json.loads(capsys.readouterr().out)["domains"]
    assert domains["words"]["num_bytes"] == sum(len(text) for text in set(TEXTS))
    # what is fine-tuned reads the same records
    assert main(["finetune", str(root), "--run", str(tmp_path / "tuned"), *STEP]) == 0


def test_train_with_a_tokenizer(corpus: Path, run: Path, slow_tokenizer: Path, tmp_path: Path) -> None:
    file = run / "data" / "tokenizer.json"
    for name, given in (("file", file), ("folder", slow_tokenizer)):
        root = tmp_path / name
        words = ["train", "--run", str(root), "--text", f"words={corpus}", "--tokenizer", str(given), "--model", *TINY]
        assert main([*words, *WITHOUT_VOCABULARY]) == 0
    assert (tmp_path / "file" / "data" / "tokenizer.json").read_text() == Tokenizer.from_file(str(file)).to_str(True)
    made = load_tokenizer(tmp_path / "folder" / "data" / "tokenizer.json")
    assert made.get_vocab_size() == load_tokenizer(file).get_vocab_size() + 1
    for text in ("word1 naïve\n\t日本", "word2  word3"):
        assert made.encode(text).ids == load_tokenizer(file).encode(text).ids
        assert made.decode(made.encode(text).ids) == text
    newest = max((tmp_path / "folder" / "checkpoints").glob("step-*"))
    config = MoLMForCausalLM.from_pretrained(newest).config
    assert (config.vocab_size, config.eos_token_id) == (made.get_vocab_size(), made.token_to_id(END_OF_TEXT))


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_finetune_a_published_model(
    kind: str, corpus: Path, run: Path, slow_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sharded bfloat16 weights, more rows than tokens, a config.json of another framework."""
    base = tmp_path / "base"
    if kind == "vocab.json":
        shutil.copytree(slow_tokenizer, base)
    else:
        base.mkdir()
        shutil.copyfile(run / "data" / "tokenizer.json", base / kind)
    shape = {name: int(value) for name, value in (item.split("=") for item in TINY)}
    fields = {"n_att_experts": 4, "n_mlp_experts": 4, "n_head": 1, "vocab_size": 288, "eos_token_id": 0}
    torch.manual_seed(0)
    config = MoLMConfig.from_reference({**shape, **fields, "bos_token_id": 0})
    model = MoLMForCausalLM(config).bfloat16()
    (base / "config.json").write_text(json.dumps({**config.to_reference(), "transformers_version": "4.30"}))
    state = dict(model.state_dict())
    shards = {f"model-{n}.safetensors": dict(list(state.items())[n::2]) for n in range(2)}
    for name, tensors in shards.items():
        save_file(tensors, base / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    tuned = tmp_path / "tuned"
    assert main(["finetune", str(base), "--run", str(tuned), "--text", f"words={corpus}", *STEP]) == 0
    assert main(["generate", str(tuned), "--prompt", "word1", "--max-new-tokens", "3"]) == 0
    made, expected = load_tokenizer(tuned / "data" / "tokenizer.json"), load_tokenizer(base)
    assert made.get_vocab() == expected.get_vocab()
    assert MoLMForCausalLM.from_pretrained(tuned / "base").lm_head.weight.equal(model.lm_head.weight)
    assert main(["convert", str(base), str(tmp_path / "native")]) == 0
    assert load_tokenizer(tmp_path / "native").get_vocab() == expected.get_vocab()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --run {out} --steps 1 --tokenizer {tmp}/none", "tokenizer: '{tmp}/none' does not exist"),
        ("train --run {out} --steps 1 --tokenizer {tmp}", "expected a tokenizer.json, or a folder with one or with"),
        ("train --run {out} --steps 1 --tokenizer {run}/data --vocab-size 300", "leave --vocab-size out"),
        ("train --run {out} --steps 1 --batch-size 1", "batch_size: 2 domains need as many lanes, got 1"),
        ("train --run {out} --steps 1 --tokenizer {run}/data/tokenizer.json --model n_layer=0", "n_layer must be"),
        ("train --run {out} --steps 1 --log wandb", "--log must be 'tensorboard', got wandb"),
        ("train --run {out} --steps 1 --text {tmp}/a.lz4 --batch-size 1", "pip install 'moduleformer_ext[data]'"),
        ("finetune {run} --run {out} --steps 1 --preset molm-tiny", "--preset: must be left out, the model has"),
        ("finetune {run} --run {out} --steps 1 --tokenizer {run}/data", "--tokenizer: must be left out"),
        # found only when texts are read
        ("train --run {out} --steps 1 --text {tmp}/b.jsonl --batch-size 1", "name one with --text-field"),
        ("train --run {out} --minutes 0.0001 --text {corpus}", "the budget leaves room for 0 steps"),
        ("train --run {out} --steps 1 --text {corpus} --segment-length 100000", "must be below the number of tokens"),
    ],
)
def test_what_cannot_begin_leaves_nothing(
    words: str,
    message: str,
    corpus: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.lz4").write_bytes(b"\x04\x22\x4d\x18")
    (tmp_path / "b.jsonl").write_text('{"body": "x"}')
    places = {"run": run, "out": tmp_path / "out", "tmp": tmp_path, "corpus": corpus}
    capsys.readouterr()
    assert main([word.format(**places) for word in words.split()]) == 2
    assert message.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_begin_leaves_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "out"
    root.mkdir()
    (tmp_path / "b.jsonl").write_text("[]")
    assert main(["train", "--run", str(root), "--steps", "1", "--text", str(tmp_path / "b.jsonl")]) == 2
    assert not root.exists() or not any(root.iterdir())


def test_tensorboard(corpus: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    root = tmp_path / "run"
    words = ["train", "--run", str(root), "--text", f"words={corpus}", "--model", *TINY, *FLAGS, "--log-every", "1"]
    assert main([*words, "--log", "tensorboard"]) == 0
    events = accumulator.EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    logged = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    steps = {record["step"]: record["loss"] for record in logged if record["event"] == "step"}
    shown = {event.step: event.value for event in events.Scalars("step/loss")}
    assert shown == pytest.approx(steps)
    (bits,) = events.Scalars("evaluation/bits_per_byte/MoLM/all")
    assert bits.value == pytest.approx(logged[-1]["bits_per_byte"]["MoLM"]["all"])


def test_tensorboard_that_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", "--run", str(tmp_path / "run"), "--steps", "1", "--log", "tensorboard"]) == 2
    assert "pip install 'moduleformer_ext[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
