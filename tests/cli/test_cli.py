import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import FLAGS, TINY

from moduleformer_ext.cli import VERBS, main
from moduleformer_ext.cli.info import serving_kernels


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], *([verb] for verb in VERBS)):
        assert main([*words, "--help"]) == 0
        assert "usage: moduleformer-ext" in capsys.readouterr().out.lower()


def test_eval_repeats_the_figures_of_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--json", "--batch-size", "2", "--segment-length", "12"]) == 0
    measured = json.loads(capsys.readouterr().out)
    expected = json.loads((run / "evaluation.json").read_text())
    assert measured["bits_per_byte"] == pytest.approx(expected["bits_per_byte"]["MoLM"]["all"], rel=1e-6)
    assert measured["domains"]["words"]["perplexity"] == pytest.approx(expected["perplexity"]["words"], rel=1e-6)


def test_eval_of_given_text(run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "usage.png"
    words = ["eval", str(run), "--text", f"a={corpus / '1.txt'}", f"b={corpus}", "--expert-usage", str(plot)]
    assert main(words) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:]] == ["a", "b", "all"]
    assert plot.is_file()


def test_generate_streams_the_prompt_and_more(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(run), "--prompt", "word1 naïve", "--max-new-tokens", "20", "--seed", "3"]
    texts = []
    for _ in range(2):
        assert main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("word1 naïve")


def test_convert_round_trip(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(run), str(tmp_path / "published"), "--to", "published"]) == 0
    assert main(["convert", str(tmp_path / "published"), str(tmp_path / "native")]) == 0
    assert sorted(path.name for path in (tmp_path / "native").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    capsys.readouterr()
    texts = []
    for model in (run, tmp_path / "published", tmp_path / "native"):
        assert main(["generate", str(model), "--prompt", "word2", "--temperature", "0", "--max-new-tokens", "9"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert json.loads((tmp_path / "published" / "config.json").read_text())["model_type"] == "moduleformer"


def test_config_file_and_flags(corpus: Path, tmp_path: Path) -> None:
    options = {"text": [f"words={corpus}"], "steps": 9, "vocab_size": 270, "batch_size": 2, "segment_length": 12}
    model = {"n_embd": 16, "att_hidden": 16, "n_layer": 2}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**options, "preset": "molm-nano", "model": model}))
    words = ["train", "--run", str(tmp_path / "run"), "--config", str(config), "--steps", "1", "--dtype", "fp32"]
    assert main([*words, "--model", "n_layer=1"]) == 0
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (stored["steps"], stored["vocab_size"]) == (1, 270)
    assert stored["model"] == {"n_embd": 16, "att_hidden": 16, "n_layer": 1}


def test_resume_of_a_finished_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "evaluation.json").read_text()
    assert main(["train", "--resume", str(run)]) == 0
    assert "continuing from" in capsys.readouterr().out
    assert (run / "evaluation.json").read_text() == before


def test_resume_refuses_other_options(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(run), "--learning-rate", "0.5", "--batch-size", "2"]) == 2
    message = capsys.readouterr().err
    assert "learning_rate is 0.002, got 0.5; leave these out" in message
    assert "batch_size" not in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--run", "{tmp}/r", "--steps", "1", "--text", "{tmp}/none"], "none' does not exist"),
        (["train", "--run", "{tmp}/r", "--steps", "1", "--text", "{tmp}/empty"], "no non-empty UTF-8 text file found"),
        (["train", "--run", "{tmp}/r"], "exactly one of steps and minutes"),
        (["train", "--run", "{run}", "--steps", "1"], "already holds a run; continue it with --resume"),
        (["train", "--resume", "{tmp}"], "is not a run directory"),
        (
            ["train", "--run", "{tmp}/r", "--steps", "1", "--model", "n_embd"],
            "--model must be FIELD=VALUE, got",
        ),
        (["train", "--run", "{tmp}/r", "--config", "{tmp}/none.toml"], "none.toml' does not exist"),
        (["generate", "{tmp}", "--prompt", "x"], "is neither a run nor a model directory"),
        (["generate", "{run}", "--prompt", "x", "--temperature", "-1"], "--temperature must be at least 0, got -1"),
        (["eval", "{run}/checkpoints/step-00000099"], "step-00000099' does not exist"),
        (["convert", "{run}", "{run}"], "exists; name a folder to create"),
    ],
)
def test_complaints_are_worded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert main([word.format(tmp=tmp_path, run=run) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"moduleformer-ext {words[0]}: ")
    assert "Traceback" not in error


def test_unknown_model_field_is_named(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--run", str(tmp_path / "r"), "--text", f"w={corpus}", "--model", "n_embed=3", *FLAGS]
    assert main(words) == 2
    assert "unknown fields n_embed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--gather-dtype", "bf16"], ["--no-reshard"], ["--background-checkpoints"], ["--expert-parallel", "2"]],
    ids=lambda flags: flags[0],
)
def test_options_of_several_processes_are_refused_alone(
    flags: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--run", str(tmp_path / "run"), "--text", f"words={corpus}", *FLAGS, *flags]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{flags[0]}: takes several processes; start them with torchrun, or leave it out" in said
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_and_resume_finishes(corpus: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    flags = [*FLAGS, "--steps", "100000", "--checkpoint-every", "100000", "--log-every", "1"]
    command = [sys.executable, "-m", "moduleformer_ext.cli", "train"]
    process = subprocess.Popen(
        [*command, "--run", str(root), "--text", f"words={corpus}", *flags, "--model", *TINY],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (root / "metrics.jsonl").exists() or len((root / "metrics.jsonl").read_text()) < 1000:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted at step" in output
    assert f"continue with: moduleformer-ext train --resume {root}" in output
    assert list((root / "checkpoints").glob("step-*"))


def test_demo_has_a_budget_under_five_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--help"]) == 0
    assert "default: 4.8" in capsys.readouterr().out


def test_info_lists_every_cuda_kernel_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    information = json.loads(capsys.readouterr().out)
    kernels = information["cuda_kernels"]
    assert bool(kernels) == (information["cuda"] is not None)
    names = [kernel["name"] for kernel in kernels]
    assert len(set(names)) == len(names)
    if kernels:
        assert {"stick_fwd_bf16_d64_sm80", "grouped_forward_bf16_128x128_sm80"} <= set(names)
    assert {kernel["arch"] for kernel in kernels} <= {80, 90}
    assert all(kernel["name"].endswith("_sm90a") == (kernel["arch"] == 90) for kernel in kernels)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(f"  {name}" in lines for name in names)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), "no kernels: they begin with compute capability 8.0"),
        ((8, 0), "sm_80 kernels"),
        ((9, 0), "sm_90a kernels of grouped_gemm in 16-bit types, sm_80's for the rest"),
        ((10, 0), "sm_80 kernels"),
        ((12, 0), "sm_80 kernels"),
    ],
)
def test_info_names_the_kernels_that_serve_a_gpu(capability: tuple[int, int], expected: str) -> None:
    kernels = [("grouped_gemm", "a_sm80", 80), ("grouped_gemm", "a_sm90a", 90), ("route_topk", "b", 80)]
    assert serving_kernels(capability, kernels) == expected
    assert serving_kernels(capability, []) == "no kernels: this build has no CUDA library"
