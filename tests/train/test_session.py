import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moduleformer_ext.train import RunDirectory, Score, TrainConfig, Trainer, evaluate, run_session

ConfigMaker = Callable[..., TrainConfig]


def _run(root: Path, config: TrainConfig) -> RunDirectory:
    run = RunDirectory.create(root, config)
    assert run_session(run, say=lambda _: None)
    return run


def _newest_tensors(run: RunDirectory) -> dict[str, torch.Tensor]:
    checkpoint = run.checkpoints.latest()
    assert checkpoint is not None
    return {**load_file(checkpoint / "model.safetensors"), **load_file(checkpoint / "trainer.safetensors")}


def _assert_same_end(run: RunDirectory, other: RunDirectory) -> None:
    own, expected = _newest_tensors(run), _newest_tensors(other)
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)
    assert json.loads(run.evaluation.read_text()) == json.loads(other.evaluation.read_text())
    steps = [(record["step"], record.get("loss")) for record in run.metrics.read()]
    assert steps == [(record["step"], record.get("loss")) for record in other.metrics.read()]


def test_a_run_leaves_everything(tiny_config: ConfigMaker, tmp_path: Path, corpus: list[str]) -> None:
    said: list[str] = []
    run = RunDirectory.create(tmp_path / "run", tiny_config(text=corpus))
    assert run_session(run, say=said.append)
    text = "\n".join(said)
    for word in ("left", "right", "unigram", "bigram (Kneser-Ney)", "MoLM", "expert_usage.png"):
        assert word in text
    results = json.loads(run.evaluation.read_text())["bits_per_byte"]
    assert results["MoLM"]["all"] > results["bigram (Kneser-Ney)"]["all"]  # after six steps
    assert "the model is behind the bigram (Kneser-Ney) model" in text
    assert "give it more minutes or steps" in text
    names = sorted(path.name for path in run.root.iterdir())
    assert names == sorted(
        [
            ".lock",
            "run.json",
            "data",
            "baselines.json",
            "plan.json",
            "checkpoints",
            "metrics.jsonl",
            "evaluation.json",
            "samples.txt",
            "expert_usage.png",
        ]
    )
    assert run.checkpoints.steps() == [4, 6]
    results = json.loads(run.evaluation.read_text())["bits_per_byte"]
    assert set(results) == {"unigram", "bigram (Kneser-Ney)", "MoLM"}
    assert all(set(row) == {"left", "right", "all"} for row in results.values())
    assert [record["step"] for record in run.metrics.read() if record["event"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_interrupted_run_continues_bit_exactly(
    tiny_config: ConfigMaker, tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = _run(tmp_path / "straight", tiny_config(text=corpus))
    take_step = Trainer.take_step

    def signalled(trainer: Trainer) -> object:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(trainer)

    monkeypatch.setattr(Trainer, "take_step", signalled)
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)  # ignored in a shell's background jobs
    run = RunDirectory.create(tmp_path / "stopped", tiny_config(text=corpus))
    assert not run_session(run, say=said.append)
    assert "interrupted at step 3 of 6" in said[-1]
    assert run.checkpoints.steps() == [2, 3]
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    again = RunDirectory.open(run.root)
    assert run_session(again, say=lambda _: None)
    _assert_same_end(again, straight)


def test_stop_at_any_stage_continues(
    tiny_config: ConfigMaker, tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = _run(tmp_path / "straight", tiny_config(text=corpus))
    run = RunDirectory.create(tmp_path / "stopped", tiny_config(text=corpus))
    for stage in ("measure_baselines", "make_plan", "evaluate", "plot_expert_usage", "generate_samples"):
        with monkeypatch.context() as patch:

            def stop(*_: object, **__: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(f"moduleformer_ext.train.session.{stage}", stop)
            with pytest.raises(KeyboardInterrupt):
                run_session(RunDirectory.open(run.root), say=lambda _: None)
    again = RunDirectory.open(run.root)
    assert run_session(again, say=lambda _: None)
    assert _newest_tensors(again).keys() == _newest_tensors(straight).keys()
    assert json.loads(again.evaluation.read_text()) == json.loads(straight.evaluation.read_text())


def test_directory_in_use_is_refused(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    begun = RunDirectory.create(tmp_path / "run", tiny_config())
    begun.data.mkdir()
    RunDirectory.create(tmp_path / "run", tiny_config())  # no step was taken
    assert not begun.data.exists()
    begun.plan.touch()
    with pytest.raises(FileExistsError, match="already holds a run; continue it with --resume"):
        RunDirectory.create(tmp_path / "run", tiny_config())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        RunDirectory.create(tmp_path / "other", tiny_config())
    with pytest.raises(FileNotFoundError, match=r"is not a run directory \(run.json is missing\)"):
        RunDirectory.open(tmp_path / "other")


def test_time_budget_sets_the_number_of_steps_once(
    tiny_config: ConfigMaker, tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moduleformer_ext.train.plan.CLOSING_SECONDS", 0.5)
    run = _run(tmp_path / "run", tiny_config(text=corpus, steps=0, minutes=0.1, dtype="auto", checkpoint_every=10_000))
    plan = json.loads(run.plan.read_text())
    assert plan["steps"] >= 20
    assert plan["dtype"] == min(plan["seconds_per_step"], key=plan["seconds_per_step"].get)
    assert run.checkpoints.steps()[-1] == plan["steps"]


def test_budget_too_small(tiny_config: ConfigMaker, tmp_path: Path, corpus: list[str]) -> None:
    with pytest.raises(ValueError, match=r"minutes: the budget leaves room for 0 steps of .* expected at least 20"):
        _run(tmp_path / "run", tiny_config(text=corpus, steps=0, minutes=0.001))


def test_segments_longer_than_the_text(tiny_config: ConfigMaker, tmp_path: Path, corpus: list[str]) -> None:
    with pytest.raises(ValueError, match="segment_length: must be below the number of tokens in domain"):
        _run(tmp_path / "run", tiny_config(text=corpus, segment_length=100_000))


def test_the_same_run_is_the_same_bytes(tiny_config: ConfigMaker, tmp_path: Path, corpus: list[str]) -> None:
    contents = []
    for name in ("one", "two"):
        root = _run(tmp_path / name, tiny_config(text=corpus)).root
        contents.append({p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()})
        del contents[-1][Path("metrics.jsonl")]  # has the speed
    assert contents[0].keys() == contents[1].keys()
    assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []


def test_a_huge_loss_ends_the_run_and_resumes(
    tiny_config: ConfigMaker, tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def huge(*arguments: object, **options: object) -> dict[str, Score]:
        scores = evaluate(*arguments, **options)  # type: ignore[arg-type]
        for score in scores.values():
            score.bits *= 1e6
        return scores

    monkeypatch.setattr("moduleformer_ext.train.session.evaluate", huge)
    run = _run(tmp_path / "run", tiny_config(text=corpus, steps=1))
    assert json.loads(run.evaluation.read_text())["perplexity"] == {"left": math.inf, "right": math.inf}
    assert run_session(RunDirectory.open(run.root), say=lambda _: None)


@pytest.mark.slow
def test_killed_run_continues_bit_exactly(tiny_config: ConfigMaker, tmp_path: Path, corpus: list[str]) -> None:
    config = tiny_config(text=corpus, steps=40, checkpoint_every=1)
    straight = _run(tmp_path / "straight", config)
    killed = RunDirectory.create(tmp_path / "killed", config)
    script = (
        "import sys; from pathlib import Path; from moduleformer_ext.train import RunDirectory, run_session;"
        "print('ready', flush=True); run_session(RunDirectory.open(Path(sys.argv[1])), say=lambda _: None)"
    )
    generator = random.Random(1)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # bits are those of as many threads
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(killed.root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(generator.uniform(0.1, 1.0))
        process.kill()
        process.wait()
        process.stdout.close()
    again = RunDirectory.open(killed.root)
    assert run_session(again, say=lambda _: None)
    _assert_same_end(again, straight)
