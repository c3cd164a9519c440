"""`moduleformer-ext train` under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from moduleformer_ext.cli import main
from moduleformer_ext.train import RunDirectory
from moduleformer_ext.train.config import RunOptions

STEPS = 6
MODULE = ("-m", "moduleformer_ext.cli")
MODEL = ["--model", "n_embd=16", "n_layer=2", "att_hidden=16", "ffd_hidden=16", "gating_size=8"]
FLAGS = [
    *["--preset", "molm-nano", "--vocab-size", "270", "--batch-size", "4", "--segment-length", "12"],
    *["--history-length", "20", "--dtype", "fp32", "--checkpoint-every", "2", "--held-out", "0.3", "--log-every", "1"],
    *MODEL,
]


def _words(corpus: Path, steps: int = STEPS) -> list[str]:
    return [*FLAGS, "--steps", str(steps), "--text", f"words={corpus}"]


def _torchrun(processes: int, *words: str, restarts: int = 0, module: tuple[str, ...] = MODULE) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launch, "--max-restarts", str(restarts), *module, *words]


def _run(processes: int, *words: str, verb: str = "train") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = _torchrun(processes, verb, *words)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in RunDirectory.open(run).metrics.read() if r["event"] == "step"]


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process without torchrun."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs") / "alone"
    assert main(["train", "--run-dir", str(root), *_words(corpus)]) == 0
    return root


@pytest.fixture(scope="module")
def two(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run of two processes, and what it said."""
    root = tmp_path_factory.mktemp("runs") / "two"
    done = _run(2, "--run-dir", str(root), *_words(corpus))
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def test_a_run_of_two_is_that_of_one(alone: Path, two: tuple[Path, str]) -> None:
    root, said = two
    for found, expected in zip(_losses(root), _losses(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    results = [json.loads((run / "evaluation.json").read_text()) for run in (root, alone)]
    assert results[0]["bits_per_byte"]["MoLM"] == pytest.approx(results[1]["bits_per_byte"]["MoLM"], rel=1e-4)
    assert {path.name for path in root.iterdir()} == {path.name for path in alone.iterdir()}
    assert said.count("held-out bits per byte:") == 1 and "6 steps, 2 processes" in said


def test_one_process_reads_and_continues_a_run_of_two(
    two: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = two
    for kind in ("native", "published"):
        assert main(["convert", str(root), str(tmp_path / kind), "--to", kind]) == 0
    written = [load_file(tmp_path / kind / "model.safetensors") for kind in ("native", "published")]
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())
    bits = []
    for model in (root, tmp_path / "native"):
        capsys.readouterr()
        assert main(["eval", str(model), "--text", str(tmp_path / "native" / "tokenizer.json"), "--json"]) == 0
        bits.append(capsys.readouterr().out)
    assert bits[0] == bits[1]
    assert main(["extend", str(root), str(tmp_path / "extended"), "--ffn", "1"]) == 0
    assert main(["prune", str(root), str(tmp_path / "pruned"), "--remaining", "0.9"]) == 0
    assert main(["train", "--resume", str(root)]) == 0  # nothing is left to do but the evaluation


def test_a_run_with_spread_experts_is_that_of_one(
    alone: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "spread"
    done = _run(2, "--run-dir", str(root), *_words(corpus), "--expert-parallel", "2")
    assert done.returncode == 0, done.stderr
    for found, expected in zip(_losses(root), _losses(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    results = [json.loads((run / "evaluation.json").read_text()) for run in (root, alone)]
    assert results[0]["bits_per_byte"]["MoLM"] == pytest.approx(results[1]["bits_per_byte"]["MoLM"], rel=1e-4)
    assert (root / "samples.txt").read_text() == (alone / "samples.txt").read_text()
    assert main(["convert", str(root), str(tmp_path / "converted"), "--to", "published"]) == 0
    assert main(["extend", str(root), str(tmp_path / "extended"), "--ffn", "1"]) == 0
    assert main(["prune", str(root), str(tmp_path / "pruned"), "--remaining", "0.9"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", str(root), "--expert-parallel", "1", "--batch-size", "8"]) == 2
    assert "batch_size is 4, got 8; leave these out" in capsys.readouterr().err
    assert main(["train", "--resume", str(root)]) == 0  # nothing is left to do but the evaluation


@pytest.mark.slow
def test_finetuning_starts_from_a_run_of_two(two: tuple[Path, str], tmp_path: Path) -> None:
    words = ["--run-dir", str(tmp_path / "run"), "--steps", "3", "--batch-size", "4", "--dtype", "fp32"]
    done = _run(2, str(two[0]), *words, verb="finetune")
    assert done.returncode == 0, done.stderr
    assert main(["finetune", str(two[0]), "--run-dir", str(tmp_path / "alone"), *words[2:]]) == 0
    for found, expected in zip(_losses(tmp_path / "run"), _losses(tmp_path / "alone"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def _starting(root: Path, *words: str, restarts: int = 0) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = _torchrun(2, "train", "--run-dir", str(root), *words, restarts=restarts)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _kill_a_worker(launcher: subprocess.Popen[str], root: Path, rank: int) -> None:
    """As soon as there is a checkpoint."""
    deadline = time.monotonic() + 60
    while not any((root / "checkpoints").glob("step-*")):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            own = f"\0RANK={rank}\0" in "\0" + (path / "environ").read_text()
        except (OSError, IndexError):
            continue
        if parent == launcher.pid and own:
            os.kill(int(path.name), signal.SIGKILL)
            return
    raise AssertionError("no such worker")


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


@pytest.mark.slow
@needs_proc
def test_a_worker_that_dies_is_restarted(corpus: Path, tmp_path: Path) -> None:
    words = _words(corpus, 40)
    straight = _run(2, "--run-dir", str(tmp_path / "straight"), *words)
    assert straight.returncode == 0, straight.stderr
    launcher = _starting(tmp_path / "killed", *words, restarts=1)
    _kill_a_worker(launcher, tmp_path / "killed", 1)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "straight")
    for name in ("shard-00001-model-00002-of-00005", "shard-00002-model-00002-of-00005"):
        ends = [
            load_file(tmp_path / run / "checkpoints/step-00000040/shards" / f"{name}.safetensors")
            for run in ("killed", "straight")
        ]
        assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


@needs_proc
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_worker_that_dies_ends_the_run_with_one_message(corpus: Path, tmp_path: Path, rank: int) -> None:
    launcher = _starting(tmp_path / "run", *_words(corpus, 2000))
    _kill_a_worker(launcher, tmp_path / "run", rank)
    began = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and time.monotonic() - began < 45
    said = [line for line in errors.splitlines() if line.startswith("moduleformer-ext train: ")]
    assert len(said) == 1, errors
    assert "another process of this run has ended or does not answer; continue with --resume" in said[0]


BAD = [
    (["--batch-size", "3"], "batch_size: 2 processes with 1 micro-batches each must have a multiple of 2 lanes, got 3"),
    pytest.param(
        ["--batch-size", "2", "--micro-batches", "2"], "must have a multiple of 4 lanes, got 2", marks=pytest.mark.slow
    ),
    pytest.param(
        ["--expert-parallel", "3"], "expert_parallel: must divide the 2 processes, got 3", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_what_does_not_divide_is_refused(corpus: Path, tmp_path: Path, words: list[str], message: str) -> None:
    done = _run(2, "--run-dir", str(tmp_path / "run"), *_words(corpus), *words)
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("moduleformer-ext train: ")]
    assert message in said
    assert not (tmp_path / "run").exists()


MIXED = """
import os, sys
from moduleformer_ext.cli import main
sys.exit(main([*sys.argv[1:], "--seed", os.environ["RANK"]]))
"""


@pytest.mark.slow
def test_mixed_configurations_are_refused(corpus: Path, tmp_path: Path) -> None:
    script = tmp_path / "mixed.py"
    script.write_text(MIXED)
    words = ("train", "--run-dir", str(tmp_path / "run"), *_words(corpus))
    command = _torchrun(2, *words, module=(str(script),))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("moduleformer-ext train: ")]
    assert said.endswith("processes: all must have the same seed, got 0 on process 0 and 1 on process 1")
    assert not (tmp_path / "run").exists()


def test_torchrun_takes_no_flag_for_its_own() -> None:
    names = [name for name in RunOptions.model_fields if name != "log"]  # it has another name for torchrun
    flags = [f"--{name.replace('_', '-')}" for name in (*names, "log_to", "run_dir", "resume", "config", "model")]
    for flag in flags:
        parsed = get_args_parser().parse_args(
            ["--nproc-per-node", "2", "-m", "moduleformer_ext.cli", "train", flag, "x"]
        )
        assert parsed.training_script_args == ["train", flag, "x"]
