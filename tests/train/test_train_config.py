import json
import math
from pathlib import Path
from typing import get_args

import pytest

from moduleformer_ext.surgery import PARTS, PENALTIES
from moduleformer_ext.train import TrainConfig
from moduleformer_ext.train.config import read_options
from moduleformer_ext.train.optimizer import learning_rate


def test_round_trip_through_json(tmp_path: Path) -> None:
    config = TrainConfig(text=("a", "b=c"), steps=7, learning_rate=1e-3, model={"n_layer": 2})
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(read_options(tmp_path / "c.json")) == config


def test_toml(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('steps = 3\nlearning_rate = 1\ntext = ["x"]\n[model]\nn_layer = 2\n')
    config = TrainConfig.from_dict(read_options(tmp_path / "c.toml"))
    assert (config.steps, config.learning_rate, config.text, config.model) == (3, 1.0, ("x",), {"n_layer": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of steps and minutes must be above 0, got steps=0 minutes=0"),
        ({"steps": 1, "minutes": 2}, "exactly one of steps and minutes must be above 0, got steps=1 minutes=2"),
        ({"steps": 1, "stepz": 2}, "stepz is unknown"),
        ({"steps": "many"}, "steps must be a valid integer, got many"),
        ({"steps": True}, "steps must be a valid integer, got True"),
        ({"steps": 2**31}, "steps must be at most 2147483647, got 2147483648"),
        ({"steps": 1, "text": "file"}, "text must be a valid array, got file"),
        ({"steps": 1, "text": [""]}, "text must be PATH or DOMAIN=PATH, got ''"),
        ({"steps": 1, "vocab_size": 10**12}, "vocab_size must be at most 1048576, got 1000000000000"),
        ({"minutes": math.inf}, "minutes must be a finite number, got inf"),
        ({"steps": 1, "domain_exponent": 1e300}, r"domain_exponent must be at most 10, got 1e\+300"),
        ({"steps": 1, "seed": -1}, "seed must be at least 0, got -1"),
        ({"steps": 1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 1, "learning_rate": -1.0}, "learning_rate must be above 0, got -1.0"),
        ({"steps": 1, "learning_rate": math.nan}, "learning_rate must be a finite number, got nan"),
        ({"steps": 1, "warmup": 1.5}, "warmup must be at most 1, got 1.5"),
        ({"steps": 1, "held_out": 1.0}, "held_out must be below 1, got 1.0"),
        ({"steps": 1, "dtype": "fp16"}, "dtype must be 'auto', 'fp32' or 'bf16', got fp16"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(options)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_options(tmp_path / "none.json")
    for name, content in (("a.json", "{"), ("a.toml", "=")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}': is not valid"):
            read_options(tmp_path / name)
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"b\.json': must be an object"):
        read_options(tmp_path / "b.json")


def test_choices_are_those_of_the_surgery() -> None:
    fields = TrainConfig.model_fields
    assert get_args(fields["trainable"].annotation) == PARTS
    assert get_args(fields["routing_penalty_kind"].annotation) == PENALTIES


def test_schedule_warms_up_and_follows_a_cosine() -> None:
    config = TrainConfig(steps=100, learning_rate=1.0, warmup=0.1, final_learning_rate=0.2)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[99] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = 10 + 89 / 2
    assert (learning_rate(config, 54, 100) + learning_rate(config, 55, 100)) / 2 == pytest.approx(
        0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (middle - 10) / 89)), abs=1e-3
    )


def test_schedule_of_very_short_runs() -> None:
    for steps in (1, 2, 3):
        config = TrainConfig(steps=steps, warmup=0.5)
        assert all(0 < learning_rate(config, step, steps) <= config.learning_rate for step in range(steps))
