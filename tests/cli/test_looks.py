"""What people see: help, versions, tables in pipes and narrow terminals, records, pictures, and a chat."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from moduleformer_ext import __version__
from moduleformer_ext.cli import GROUPS, VERBS, chat, main
from moduleformer_ext.data import load_tokenizer
from moduleformer_ext.models import MoLMForCausalLM

COMMAND = [sys.executable, "-m", "moduleformer_ext.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}


def test_help_of_all_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for title, verbs in GROUPS.items():
        assert f"─ {title} ─" in shown
        assert re.search(r".*".join(rf"│ {verb} " for verb in verbs), shown, re.DOTALL)  # in this order
    assert "Exit status: 0 done; 1 a fault of the program" in shown
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moduleformer_ext {__version__}\n"


def test_help_has_groups_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--help"]) == 0
    shown = capsys.readouterr().out
    for title in ("Text", "Model", "Batches", "Objective", "Length", "Optimiser", "Machine", "Records"):
        assert f"─ {title} ─" in shown
    assert "[default: 0.002]" in shown
    assert "default: ()" not in shown
    objective = shown[shown.index("─ Objective ─") : shown.index("─ Length ─")]
    assert "--concentrate" in objective and "--routing-penalty" in objective and "--steps" not in objective


def test_every_verb_that_runs_a_model_has_a_device_and_a_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("train", "finetune", "demo", "generate", "chat", "eval", "usage", "prune"):
        assert main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        assert "--device" in shown and "--dtype" in shown, verb


def test_every_reading_verb_has_json(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("generate", "eval", "usage", "prune", "compare", "info", "plot", "bench"):
        assert main([verb, "--help"]) == 0
        assert "--json" in capsys.readouterr().out, verb


def test_narrow_help_has_no_frames(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        assert "│" not in shown
        assert max(map(len, shown.splitlines())) <= 20


@pytest.mark.parametrize("words", ["info", "info --json", "eval --help", "--help", "generate {run} --prompt x"])
def test_a_reader_that_goes_away(words: str, run: Path) -> None:
    line = [word.format(run=run) for word in words.split()]
    with subprocess.Popen(
        [*COMMAND, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_tables_in_20_columns(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    capsys.readouterr()
    for words in (
        ["eval", str(run)],
        ["compare", str(run), str(run)],
        ["prune", str(run), "x", "--remaining", "0.9", "--dry-run"],
    ):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert "words" in shown or "layer 0\nattention" in shown
        assert "…" not in shown
    assert main(["eval", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["domain", "bits/byte", "perplexity", "tokens", "bytes"]


def test_names_with_spaces_and_other_letters(run: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "ein Lauf, тест 日本"
    shutil.copytree(run, root)
    texts = tmp_path / "наши тексты"
    shutil.copytree(corpus, texts)
    capsys.readouterr()
    assert main(["eval", str(root), "--text", f"日本={texts}", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["domains"]) == ["日本"]
    assert main(["plot", str(root), "--output", str(tmp_path / "мой.png")]) == 0
    assert main(["usage", str(root), str(tmp_path / "an output"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert set(record["domains"]) == {"words"}


def test_prune_and_generate_as_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["prune", str(run), str(tmp_path / "o"), "--remaining", "0.8", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["after"] <= 0.8 * plan["parameters"]["before"]
    assert [row["layer"] for row in plan["experts"]] == [0, 0, 1, 1]
    assert all(set(row["kept"]).isdisjoint(row["pruned"]) for row in plan["experts"])
    assert main(["generate", str(run), "--prompt", "word1", "--seed", "1", "--max-new-tokens", "6"]) == 0
    text = capsys.readouterr().out
    words = ["generate", str(run), "--prompt", "word1", "--seed", "1", "--max-new-tokens", "6", "--json"]
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["prompt"] + record["text"] + "\n" == text
    assert len(record["token_ids"]) <= 6


def test_dtype_converts_the_weights(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    seen: list[torch.dtype] = []
    stream = MoLMForCausalLM.generate_stream

    def watch(self: MoLMForCausalLM, *arguments: object, **options: object) -> Iterator[torch.Tensor]:
        seen.append(self.lm_head.weight.dtype)
        return stream(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(MoLMForCausalLM, "generate_stream", watch)
    for dtype in ("auto", "fp32", "bf16"):
        assert main(["generate", str(run), "--prompt", "x", "--max-new-tokens", "2", "--dtype", dtype]) == 0
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    capsys.readouterr()
    bits = {}
    for dtype in ("auto", "fp32", "bf16"):
        assert main(["eval", str(run), "--json", "--dtype", dtype]) == 0
        bits[dtype] = json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert bits["auto"] == bits["fp32"] != bits["bf16"] == pytest.approx(bits["fp32"], rel=0.01)


def test_plot(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    log = other / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [record for record in records if record["event"] == "step"]
    earlier = [{**steps[0], "step": n, "tokens": 24 * n, "loss": 6.0 - n} for n in (1, 2, 3)]
    log.write_text("".join(json.dumps(record) + "\n" for record in (*earlier, *records)))
    picture = tmp_path / "loss.png"
    words = ["plot", str(run), str(other), "--output", str(picture), "--x", "tokens", "--smoothing", "0.5"]
    capsys.readouterr()
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "steps", "tokens", "loss", "held-out", "bits/byte"]
    assert lines[-1] == f"wrote {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")
    drawn = picture.read_bytes()
    assert main([*words, "--json"]) == 0
    curves = json.loads(capsys.readouterr().out)
    assert curves[str(other)]["steps"] == [1, 2, 3, 4]
    assert curves[str(other)]["values"][:3] == [5.0, 4.0, 3.0]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert curves[str(run)]["held_out"] == {"4": evaluation["bits_per_byte"]["MoLM"]["all"]}
    assert main([*words, "--metric", "grad_norm"]) == 0
    assert picture.read_bytes() != drawn
    assert main(["plot"]) == 2
    assert "RUNS must be given" in capsys.readouterr().err
    log.write_text("".join(json.dumps(record) + "\n" for record in records if record["event"] != "step"))
    assert main(words) == 2
    assert f"run: '{other}': metrics.jsonl has no figures of a step yet" in capsys.readouterr().err


def test_shards_and_tokenizer_config(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    assert main(["convert", str(run), str(whole), "--to", "published"]) == 0
    assert main(["convert", str(run), str(shards), "--to", "published", "--max-shard-size", "20KB"]) == 0
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert len(names) > 2 and sorted(set(index["weight_map"].values())) == names
    assert max((shards / name).stat().st_size for name in names) < 30_000
    models = [MoLMForCausalLM.from_pretrained(path).state_dict() for path in (whole, shards)]
    assert all(torch.equal(models[1][name], tensor) for name, tensor in models[0].items())
    for folder in (whole, shards):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["eos_token"] == settings["pad_token"] == "<|endoftext|>"
        assert load_tokenizer(folder).to_str() == load_tokenizer(run / "data").to_str()
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shards)
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert tokenizer("word1 naïve").input_ids == load_tokenizer(shards).encode("word1 naïve").ids
    assert main(["convert", str(shards), str(tmp_path / "hf"), "--to", "hf", "--max-shard-size", "20KB"]) == 0
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2


class Terminal:
    """A program on a terminal, and what it has shown."""

    def __init__(self, words: list[str], home: Path) -> None:
        self.descriptor, slave = pty.openpty()
        environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(home), "COLUMNS": "80"}
        self.process = subprocess.Popen(
            [*COMMAND, *words], stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.shown!r}"
            if select.select([self.descriptor], [], [], 0.2)[0]:
                self.shown += os.read(self.descriptor, 65536).decode(errors="replace")

    def type(self, text: str) -> None:
        self.shown = ""
        os.write(self.descriptor, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C; then waits until a prompt is there and nothing comes after, so that readline listens."""
        self.shown = ""
        self.process.send_signal(signal.SIGINT)
        self.wait_for("\n> ")
        while select.select([self.descriptor], [], [], 0.5)[0]:
            self.shown += os.read(self.descriptor, 65536).decode(errors="replace")

    def close(self) -> int:
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.descriptor], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.descriptor, 65536).decode(errors="replace")
                except OSError:
                    break
        os.close(self.descriptor)
        return self.process.wait(timeout=30)


def test_chat_on_a_terminal(run: Path, tmp_path: Path) -> None:
    """Ctrl-C ends an answer and not the chat; Ctrl-D ends it; the next chat knows the messages of this one."""
    terminal = Terminal(["chat", str(run), "--max-new-tokens", "1000000", "--seed", "1"], tmp_path)
    terminal.wait_for("> ")
    terminal.type("word1 word2\n")
    terminal.wait_for("word1 word2\r\n")
    time.sleep(1)  # it answers
    terminal.interrupt()
    terminal.interrupt()  # at the prompt: a new line
    terminal.type("/reset\n")
    terminal.wait_for("/reset\r\n> ")
    terminal.type("\x04")
    assert terminal.close() == 0
    history = tmp_path / "moduleformer-ext" / "chat_history"
    assert "word1 word2" in history.read_text()
    again = Terminal(["chat", str(run), "--max-new-tokens", "2"], tmp_path)
    again.wait_for("> ")
    again.type("\x1b[A\x1b[A")  # two lines up
    again.wait_for("word1 word2")
    again.type("\n")
    again.wait_for("\n> ")
    again.type("\x04")
    assert again.close() == 0


def test_a_second_interrupt_finds_nothing_to_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the prompt, and once more while the new line for it is written."""
    prompt = Mock(side_effect=[KeyboardInterrupt, EOFError])
    monkeypatch.setattr("builtins.input", prompt)
    monkeypatch.setattr(chat, "print", lambda *_: signal.raise_signal(signal.SIGINT), raising=False)
    assert main(["chat", str(run)]) == 0
    assert prompt.call_count == 2


def test_chat_in_a_pipe(run: Path, tmp_path: Path) -> None:
    """Messages are lines; the answers depend on what was said, unless it was forgotten."""

    def answers(messages: str, *words: str) -> str:
        command = [*COMMAND, "chat", str(run), "--temperature", "0", "--max-new-tokens", "5", *words]
        environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(tmp_path)}
        result = subprocess.run(command, input=messages, capture_output=True, text=True, env=environment, check=True)
        assert result.stderr == ""
        return result.stdout

    one = answers("word3\n")
    assert answers("word3\n/reset\nword3\n") == one + one
    assert answers("") == ""
    assert not (tmp_path / "moduleformer-ext").exists()
