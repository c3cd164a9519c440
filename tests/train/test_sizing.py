"""Which size a run gets, as a function of the measured speed; and that a run gets it."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moduleformer_ext.cli.demo import SIZES
from moduleformer_ext.distributed import Processes
from moduleformer_ext.train import Choice, RunDirectory, Size, TrainConfig, choose_size, run_session
from moduleformer_ext.train import plan as planning
from moduleformer_ext.train.plan import SAFETY, measure_speed

ConfigMaker = Callable[..., TrainConfig]

LARGE, MIDDLE, SMALL = (Size(name, {}, steps) for name, steps in (("large", 400), ("middle", 600), ("small", 900)))
SECONDS = {"large": 1.0, "middle": 0.3, "small": 0.05}
"""Of a step, at speed 1."""


def choose(speed: float, spare: float = 500.0) -> tuple[Choice, list[str]]:
    measured: list[str] = []

    def seconds(size: Size) -> float:
        measured.append(size.name)
        return SECONDS[size.name] / speed

    return choose_size((LARGE, MIDDLE, SMALL), seconds, lambda *_: spare), measured


@pytest.mark.parametrize(
    ("speed", "name", "enough"),
    [(10, "large", True), (1, "large", True), (0.9, "large", True), (0.88, "middle", True), (0.41, "middle", True),
     (0.39, "small", True), (0.11, "small", True), (0.09, "small", False), (0.001, "small", False)],
)  # fmt: skip
def test_the_largest_that_there_is_time_for(speed: float, name: str, enough: bool) -> None:
    choice, measured = choose(speed)
    assert (choice.size.name, choice.enough) == (name, enough)
    assert choice.seconds_per_step == SECONDS[name] / speed
    assert choice.steps == pytest.approx(SAFETY * 500 * speed / SECONDS[name], abs=1)
    # No smaller one is measured in vain.
    assert measured == ["large", "middle", "small"][: ["large", "middle", "small"].index(name) + 1]
    assert choose(speed)[0] == choice


def test_the_slower_the_machine_the_smaller_the_model() -> None:
    chosen = [[LARGE, MIDDLE, SMALL].index(choose(1 / slow)[0].size) for slow in range(1, 60)]
    assert chosen == sorted(chosen) and set(chosen) == {0, 1, 2}


def test_what_is_short_is_said_in_seconds() -> None:
    choice, _ = choose(0.05)
    assert choice.steps == 450 and choice.seconds_short == pytest.approx(450 * 1.0 / SAFETY)
    assert choose(1)[0].seconds_short == 0
    nothing, _ = choose(1, spare=-3.0)
    assert nothing.steps == 0 and nothing.size is LARGE  # of equals


def test_time_left_depends_on_the_size() -> None:
    """Whose evaluation takes its share."""
    choice = choose_size((LARGE, SMALL), lambda size: SECONDS[size.name], lambda seconds, size: 500 - 400 * seconds)
    assert choice.size is SMALL


@pytest.mark.parametrize(
    ("seconds", "threads", "dtype", "best"),
    [
        ({8: 1.0, 4: 2.0}, 8, "fp32", 1.0),  # an idle machine
        ({8: 5.0, 4: 3.0, 2: 0.9, 1: 1.1}, 2, "fp32", 0.9),  # a busy one
        ({8: 5.0, 4: 3.0, 2: 0.9, 1: 0.8}, 1, "bf16", 0.5),
    ],
)
def test_as_many_threads_as_are_fastest(
    seconds: dict[int, float], threads: int, dtype: str, best: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def measure(trainer: str, count: int, processes: Processes, *, hopeless: float = 0) -> float:
        asked.append((trainer, count))
        return seconds[count] if trainer == "fp32" else best if dtype == "bf16" else 7.0

    monkeypatch.setattr(planning, "_seconds_per_step", measure)
    monkeypatch.setattr(planning.torch, "get_num_threads", lambda: 8)
    speed = measure_speed(lambda name: name, "auto")
    assert speed.threads == threads and speed.best == best
    assert planning.fastest(speed.seconds_per_step) == dtype
    assert asked == [*(("fp32", count) for count in seconds), ("bf16", threads)]
    assert measure_speed(lambda name: name, "fp32", threads=4) == ({"fp32": seconds[4]}, 4)


def test_what_is_hopeless_is_not_measured_to_the_end() -> None:
    class Slow:
        steps = 0

        def take_step(self) -> None:
            self.steps += 1
            time.sleep(0.02)

    assert planning._seconds_per_step(trainer := Slow(), 1, hopeless=0.01) > 0.01
    assert trainer.steps == 1
    assert planning._seconds_per_step(trainer := Slow(), 1) > 0.01
    assert trainer.steps == 8


def test_sizes_are_for_one_process(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", tiny_config())
    with pytest.raises(ValueError, match="sizes must be left out with several processes, got 2"):
        run_session(run, sizes=(LARGE,), processes=Processes(size=2))


def test_no_sizes() -> None:
    with pytest.raises(ValueError, match="choose_size: sizes must not be empty"):
        choose_size((), lambda size: 1.0, lambda *_: 1.0)


@pytest.fixture
def closes_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("session", "plan"):
        monkeypatch.setattr(f"moduleformer_ext.train.{module}.CLOSING_SECONDS", 0.5)


@pytest.mark.usefixtures("closes_soon")
def test_a_run_gets_its_size(tiny_config: ConfigMaker, tmp_path: Path, corpus: list[str]) -> None:
    config = tiny_config(text=corpus, steps=0, minutes=0.1, checkpoint_every=10_000)
    sizes = (Size("endless", {}, 10**9), Size("short", {"segment_length": 6}, 10))
    run, said = RunDirectory.create(tmp_path / "run", config), []
    assert run_session(run, say=said.append, sizes=sizes)
    stored = json.loads((run.root / "run.json").read_text())
    assert stored["segment_length"] == 6 and stored["history_length"] == config.history_length
    assert any("for a step of the endless model: it trains the short one" in line for line in said)
    assert not any("expect to end behind" in line for line in said)
    assert json.loads(run.plan.read_text())["steps"] >= 20
    with pytest.raises(FileExistsError, match="must not have begun to train"):
        run.configure(config)
    again: list[str] = []
    assert run_session(RunDirectory.open(run.root), say=again.append, sizes=sizes)  # nothing is chosen twice
    assert json.loads((run.root / "run.json").read_text()) == stored


def test_tokens_of_the_same_library_are_kept(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    root, config = tmp_path / "run", tiny_config(vocab_size=300)
    RunDirectory.replace(root, config).dataset()
    before = (root / "data" / "index.json").stat().st_ino
    again = RunDirectory.replace(root, tiny_config(vocab_size=300, segment_length=6))
    assert again.dataset().tokenizer.get_vocab_size() == 300
    assert (root / "data" / "index.json").stat().st_ino == before
    other = RunDirectory.replace(root, tiny_config(vocab_size=310))
    assert not other.data.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.usefixtures("closes_soon")
def test_a_machine_that_is_too_slow_is_told(tiny_config: ConfigMaker, tmp_path: Path, corpus: list[str]) -> None:
    config = tiny_config(text=corpus, steps=0, minutes=0.1, checkpoint_every=10_000)
    said: list[str] = []
    assert run_session(
        RunDirectory.create(tmp_path / "run", config), say=said.append, sizes=(Size("endless", {}, 10**9),)
    )
    (told,) = [line for line in said if "expect to end behind it" in line]
    assert "it takes about 1000000000 to be ahead of the bigram (Kneser-Ney) model" in told
    assert int(told.rsplit(" ", 1)[1]) > 1000


def test_the_sizes_of_the_demo_are_valid_and_come_largest_first() -> None:
    base = SIZES[0].applied(TrainConfig(minutes=4.8))
    work = []
    for size in SIZES:
        config = size.applied(base)
        model = config.architecture(config.vocab_size)
        work.append(model.n_layer * config.batch_size * config.segment_length)
        assert config.minutes == base.minutes
    assert work == sorted(work, reverse=True) and len(SIZES) >= 2
