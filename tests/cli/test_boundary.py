"""What a user can get wrong: one line that names it, exit status 2, and nothing read, written or echoed before."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FLAGS, TINY
from tokenizers import Tokenizer

from moduleformer_ext.cli import VERBS, main
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM


def _complaint(words: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    capsys.readouterr()
    assert main(words) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"moduleformer-ext {words[0]}: ")
    return line.removeprefix(f"moduleformer-ext {words[0]}: ")


@pytest.fixture
def model(run: Path, tmp_path: Path) -> Path:
    """A model directory to damage."""
    assert main(["convert", str(run), str(tmp_path / "model")]) == 0
    return tmp_path / "model"


MEASURING = [
    ("--segment-length -5", "--segment-length must be at least 1, got -5"),
    ("--segment-length 0", "--segment-length must be at least 1, got 0"),
    ("--segment-length 1000000000000", "--segment-length must be at most 2147483647, got 1000000000000"),
    ("--segment-length 1.5", "--segment-length must be a valid integer"),
    ("--batch-size -3", "--batch-size must be at least 1, got -3"),
    ("--batch-size x", "--batch-size must be a valid integer"),
    ("--dtype fp16", "--dtype must be 'auto', 'fp32' or 'bf16', got fp16"),
    ("--device nowhere", "--device must be a torch device of this machine, got nowhere"),
    ("--text", "--text must be given a value"),
]
TRAINING = [
    ("--minutes inf", "--minutes must be a finite number, got inf"),
    ("--minutes nan", "--minutes must be a finite number, got nan"),
    ("--minutes -1", "--minutes must be at least 0, got -1"),
    ("--vocab-size 1000000000000", "--vocab-size must be at most 1048576, got 1000000000000"),
    ("--vocab-size 256", "--vocab-size must be at least 257, got 256"),
    ("--held-out 0", "--held-out must be above 0, got 0"),
    ("--batch-size 0", "--batch-size must be at least 1, got 0"),
    ("--learning-rate nan", "--learning-rate must be a finite number, got nan"),
    ("--weight-decay -0.1", "--weight-decay must be at least 0, got -0.1"),
    ("--warmup 2", "--warmup must be at most 1, got 2"),
    ("--beta2 1", "--beta2 must be below 1, got 1"),
    ("--seed -1", "--seed must be at least 0, got -1"),
    ("--seed 100000000000000000000", "--seed must be at most 9223372036854775807"),
    ("--domain-exponent 1e300", "--domain-exponent must be at most 10, got 1e300"),
    ("--keep-checkpoints 0", "--keep-checkpoints must be at least 1, got 0"),
    ("--log-every x", "--log-every must be a valid integer"),
    ("--dtype fp16", "--dtype must be 'auto', 'fp32' or 'bf16', got fp16"),
    ("--device nowhere", "--device must be a torch device of this machine, got nowhere"),
    ("--text", "--text must be given a value"),
    ("--model", "--model must be given a value"),
    ("--model n_embd", "--model must be FIELD=VALUE, got 'n_embd'"),
    ("--model n_embed=3", "n_embed"),
]
OTHERS = {
    "generate {run} --prompt x": [
        ("--temperature -1", "--temperature must be at least 0, got -1"),
        ("--temperature inf", "--temperature must be a finite number, got inf"),
        ("--top-p 0", "--top-p must be above 0, got 0"),
        ("--top-p 1.5", "--top-p must be at most 1, got 1.5"),
        ("--top-k 0", "--top-k must be at least 1, got 0"),
        ("--max-new-tokens -1", "--max-new-tokens must be at least 0, got -1"),
        ("--max-new-tokens 1000000000000", "--max-new-tokens must be at most 2147483647, got 1000000000000"),
        ("--max-new-tokens 2147483647", "there is not enough memory"),
        ("--seed -1", "--seed must be at least 0, got -1"),
        ("--device nowhere", "--device must be a torch device of this machine, got nowhere"),
        ("--dtype fp16", "--dtype must be 'auto', 'fp32' or 'bf16', got fp16"),
    ],
    "chat {run}": [
        ("--temperature -1", "--temperature must be at least 0, got -1"),
        ("--remember 0", "--remember must be at least 1, got 0"),
        ("--device nowhere", "--device must be a torch device of this machine, got nowhere"),
    ],
    "plot {run}": [
        ("--output {out}/a.png", "--output must be a .png file in a folder that exists"),
        ("--output {out}.jpg", "--output must be a .png file in a folder that exists"),
        ("--output {out}.png --smoothing 1", "--smoothing must be below 1, got 1"),
        ("--output {out}.png --x time", "--x must be 'steps' or 'tokens', got time"),
        ("--output {out}.png --metric accuracy", "metric must be one of aux_loss, grad_norm, learning_rate, "),
        ("{text} --output {out}.png", "is not a run directory"),
    ],
    "prune {run} {out}": [
        ("--threshold 2", "--threshold must be at most 1, got 2"),
        ("--threshold nan", "--threshold must be a finite number, got nan"),
        ("--remaining -1", "--remaining must be at least 0, got -1"),
        ("--threshold 0.1 --remaining 0.1", "exactly one of --threshold and --remaining must be given"),
        ("--threshold 0.1 --normalise min", "--normalise must be 'max' or 'sum', got min"),
    ],
    "extend {run} {out}": [
        ("--ffn -1", "--ffn must be at least 0, got -1"),
        ("--attention 1 -1", "--attention must be at least 0, got -1"),
        ("--ffn 1000000000000", "--ffn must be at most 65536, got 1000000000000"),
        ("--ffn 1 --seed -1", "--seed must be at least 0, got -1"),
        ("--ffn 1 --init zero", "--init must be 'random' or 'copy', got zero"),
    ],
    "finetune {run} --run {out} --steps 1": [
        ("--concentrate -1", "--concentrate must be at least 0, got -1"),
        ("--concentrate inf", "--concentrate must be a finite number, got inf"),
    ],
    "demo --run {out}": [
        ("--minutes inf", "--minutes must be a finite number, got inf"),
        ("--minutes 0", "--minutes must be above 0, got 0"),
        ("--device nowhere", "--device must be a torch device of this machine, got nowhere"),
    ],
    "eval {run}": [("--expert-usage {out}/a.png", "--expert-usage must be a .png file in a folder that exists")],
    "convert {run} {out}": [
        ("--to elsewhere", "--to must be 'native', 'published' or 'hf', got elsewhere"),
        ("--to hf --max-shard-size 5", "--max-shard-size must be a number of KB, MB, GB or TB, such as 5GB, got 5"),
        ("--max-shard-size 5GB", "--max-shard-size: is for published and hf"),
    ],
    "train --run {out} --steps 1": [
        ("--preset huge", "preset must be one of"),
        ("--model n_layer=0", "n_layer must be a positive integer, got 0"),
        ("--model resid_pdrop=x", "resid_pdrop"),
    ],
    "train": [
        ("--steps 1", "exactly one of --run-dir and --resume must be given"),
        ("--steps 1 --run {out} --resume {run}", "exactly one of --run-dir and --resume must be given"),
    ],
}
CASES = [
    *[(f"{verb} {option}", message) for verb in ("eval {run}", "usage {run} {out}") for option, message in MEASURING],
    *[(f"prune {{run}} {{out}} --remaining 0.9 {option}", message) for option, message in MEASURING],
    *[(f"train --run {{out}} --text {{text}} --steps 1 {option}", message) for option, message in TRAINING],
    *[(f"finetune {{run}} --run {{out}} --steps 1 {option}", message) for option, message in TRAINING],
    *[(f"{start} {option}", message) for start, cases in OTHERS.items() for option, message in cases],
]


@pytest.mark.parametrize(("line", "message"), CASES)
def test_wrong_options(
    line: str, message: str, run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(run=run, out=tmp_path / "out", text=corpus) for word in line.split()]
    assert message in _complaint(words, capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["train --run {out} --steps 1", "eval {run}", "finetune {run} --run {out} --steps 1"])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "--text must be PATH or DOMAIN=PATH, got ''; write . for the current folder"),
        ("words=", "--text must be PATH or DOMAIN=PATH, got 'words='"),
        ("a\udcff", "--text must be UTF-8 text, got 'a\\udcff'"),
        ("all={text}", "'all' stands for all domains together"),
        ("{text}/none", "none' does not exist"),
        ("{tmp}/loop", "loop' does not exist"),
    ],
)
def test_wrong_texts(
    verb: str, source: str, message: str, run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    words = [word.format(run=run, out=tmp_path / "out") for word in verb.split()]
    assert message in _complaint([*words, "--text", source.format(text=corpus, tmp=tmp_path)], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval {run} --wrong 3", "Unknown option: --wrong."),
        ("eval", "model must be given a value."),
        ("generate {run} {run}", "Unused Tokens: "),
        ("train --run", "--run-dir must be given a value."),
    ],
)
def test_wrong_words_name_the_usage_of_their_verb(
    words: str, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words.format(run=run).split()
    complaint = _complaint(line, capsys)
    assert complaint.startswith(message)
    assert f"Usage: moduleformer-ext {line[0]} [OPTIONS]" in complaint
    assert complaint.endswith("; see --help")


def test_no_verb_and_no_such_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for words, got in (([], "none"), (["trian"], "'trian'")):
        assert main(words) == 2
        assert f"VERB must be one of {', '.join(VERBS)}, " in (error := capsys.readouterr().err)
        assert f"got {got}" in error


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _not_json(path: Path) -> None:
    path.write_text("{")


def _not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe{}")


def _a_list(path: Path) -> None:
    path.write_text("[1]")


@pytest.mark.parametrize("damage", [_not_json, _not_utf8, _a_list])
@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("run.json", "eval {run}"),
        ("data/index.json", "eval {run}"),
        ("data/tokenizer.json", "generate {run} --prompt x"),
        ("checkpoints/step-00000004/trainer.json", "train --resume {run}"),
        ("plan.json", "train --resume {run}"),
        ("baselines.json", "train --resume {run}"),
    ],
)
def test_damaged_files_of_a_run(
    name: str, verb: str, damage: object, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    damage(broken / name)  # type: ignore[operator]
    assert main([word.format(run=broken) for word in verb.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moduleformer-ext")]
    assert str(broken / name) in line


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("data/held_out.words.npy", "eval {run}"),
        ("checkpoints/step-00000004/model.safetensors", "eval {run}"),
        ("checkpoints/step-00000004/trainer.safetensors", "train --resume {run}"),
    ],
)
def test_torn_files_of_a_run(
    name: str, verb: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    _torn(broken / name)
    assert main([word.format(run=broken) for word in verb.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moduleformer-ext")]
    assert str(broken / name) in line


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b'{"domains": 3}', b'{"domains": {"a": {}}}'])
def test_damaged_counts(content: bytes, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "usage.json").write_bytes(content)
    words = ["prune", str(run), str(tmp_path / "out"), "--remaining", "0.9", "--usage", str(tmp_path)]
    assert "usage.json'" in _complaint(words, capsys)


@pytest.mark.parametrize("name", ["c.json", "c.toml"])
@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b'{"steps": "x"}', b'steps = "x"', b"wrong = 1"])
def test_damaged_config(name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(content)
    complaint = _complaint(["train", "--run", str(tmp_path / "out"), "--config", str(tmp_path / name)], capsys)
    assert f"{name}'" in complaint
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_in_a_config_is_no_damage(corpus: Path, tmp_path: Path) -> None:
    for name, content in (("c.json", '{"steps": 1}'), ("c.toml", "steps = 1")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        words = ["train", "--run", str(tmp_path / f"run-{name}"), "--config", str(tmp_path / name)]
        assert main([*words, "--text", f"words={corpus}", *FLAGS, "--steps", "1", "--model", *TINY]) == 0


def test_a_tokenizer_larger_than_the_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([f"more{number}" for number in range(9)])
    tokenizer.save(str(model / "tokenizer.json"))
    assert "tokenizer.json' must have at most" in _complaint(["generate", str(model), "--prompt", "more8"], capsys)


@pytest.mark.parametrize("verb", ["generate {model} --prompt x", "eval {model} --text {text}"])
def test_weights_that_are_not_numbers(verb: str, model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = MoLMForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    broken.save_pretrained(model)
    words = [word.format(model=model, text=corpus) for word in verb.split()]
    assert "must be finite, got others in lm_head.weight" in _complaint(words, capsys)


def test_a_config_of_more_layers_than_weights(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(model / "model.safetensors")
    config = MoLMConfig.from_reference(json.loads((model / "config.json").read_text())).to_dict()
    config["n_layer"] = 1_000_000
    save_file(tensors, model / "model.safetensors", {"format": "moduleformer_ext", "config": json.dumps(config)})
    assert "n_layer must be 2" in _complaint(["generate", str(model), "--prompt", "x"], capsys)


def test_special_tokens_in_a_prompt_are_text(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    seen: list[torch.Tensor] = []

    def watch(self: MoLMForCausalLM, ids: torch.Tensor, **_: object) -> Iterator[torch.Tensor]:
        seen.append(ids)
        return iter(())

    monkeypatch.setattr(MoLMForCausalLM, "generate_stream", watch)
    assert main(["generate", str(run), "--prompt", "a<|endoftext|>b"]) == 0
    assert capsys.readouterr().out == "a<|endoftext|>b\n"
    assert seen[0].tolist()[0].count(0) == 1  # the one that every document begins with


@pytest.mark.parametrize("prompt", ["a\udcff", None])
def test_prompts_that_are_not_text(
    prompt: str | None, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    words = ["generate", str(run), *(["--prompt", prompt] if prompt else [])]
    assert "must be UTF-8 text" in _complaint(words, capsys)


def test_output_that_a_terminal_cannot_show(run: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    words = ["generate", str(run), "--prompt", "naïve", "--max-new-tokens", "0"]
    result = subprocess.run(
        [sys.executable, "-m", "moduleformer_ext.cli", *words], capture_output=True, env=environment, check=False
    )
    assert (result.returncode, result.stdout) == (0, b"na\\xefve\n")


def test_an_unknown_instruction_set_is_one_line(run: Path) -> None:
    environment = {**os.environ, "MFX_CPU_ISA": "x", "OMP_NUM_THREADS": "1"}
    for words in (["info"], ["generate", str(run), "--prompt", "x"]):
        result = subprocess.run(
            [sys.executable, "-m", "moduleformer_ext.cli", *words],
            capture_output=True,
            env=environment,
            check=False,
            text=True,
        )
        assert result.returncode == 2
        assert "MFX_CPU_ISA must be baseline, avx2, avx512 or avx512_bf16" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not result.stdout.startswith("x")


def test_file_names_need_not_be_utf8(run: Path, corpus: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    shutil.copytree(corpus, texts)
    shutil.copyfile(texts / "1.txt", os.fsencode(texts) + b"/\xff.txt")
    (texts / "1.txt").unlink()
    root = tmp_path / os.fsdecode(b"run-\xfe")
    words = ["train", "--run", str(root), "--text", f"words={texts}", "--model", *TINY, *FLAGS]
    assert main(words) == 0
    assert (root / "evaluation.json").is_file()


def test_faults_of_the_program_keep_their_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("fault")

    monkeypatch.setattr("moduleformer_ext.cli.measure.load_source", fail)
    with pytest.raises(KeyError, match="fault"):
        main(["eval", str(run)])


def test_traceback_on_demand(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is neither a run nor"):
        main(["eval", str(tmp_path), "--traceback"])


def test_a_second_trainer_is_refused_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading goes on beside it and deletes nothing; a killed one is no obstacle."""
    root = tmp_path / "run"
    shutil.copytree(run, root)
    script = (
        "import sys, time; from pathlib import Path; from moduleformer_ext.train import RunDirectory\n"
        "with RunDirectory.open(Path(sys.argv[1])).lock(): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        (root / ".partial-data").mkdir()
        log = (root / "metrics.jsonl").read_text()
        assert f"run: '{root}' is being trained by another process" in _complaint(
            ["train", "--resume", str(root)], capsys
        )
        assert "is being trained by another process" in _complaint(["demo", "--run", str(root)], capsys)
        assert (root / "evaluation.json").is_file()
        assert main(["eval", str(root)]) == 0
        assert main(["generate", str(root), "--prompt", "x", "--max-new-tokens", "1"]) == 0
        assert (root / ".partial-data").is_dir()
        assert (root / "metrics.jsonl").read_text() == log
        process.send_signal(signal.SIGKILL)
    assert main(["train", "--resume", str(root)]) == 0
    assert not (root / ".partial-data").exists()
