from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moduleformer_ext.train import TrainConfig

WORDS = ("red", "green", "blue", "one", "two", "three", "over", "under", "and", "or", "not", "the", "a")


torch.set_num_threads(1)  # the models here are too small for more
ConfigMaker = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def tiny_config() -> ConfigMaker:
    """Makes configs of a model of a few thousand parameters and a run of a few steps."""
    return _tiny_config


def _tiny_config(**changes: object) -> TrainConfig:
    model = {"n_embd": 16, "n_layer": 2, "att_hidden": 16, "ffd_hidden": 16, "gating_size": 8}
    options: dict[str, object] = {
        "vocab_size": 270,
        "held_out": 0.3,
        "preset": "molm-nano",
        "model": model,
        "batch_size": 3,
        "segment_length": 12,
        "history_length": 20,
        "steps": 6,
        "dtype": "fp32",
        "checkpoint_every": 2,
        "log_every": 1,
        **changes,
    }
    return TrainConfig.from_dict(options)


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Folders of two domains with a few small files each."""
    for domain, offset in (("left", 0), ("right", 5)):
        folder = tmp_path / "corpus" / domain
        folder.mkdir(parents=True)
        for number in range(8):
            words = [WORDS[(offset + number * index) % len(WORDS)] for index in range(60)]
            (folder / f"{number}.txt").write_text(" ".join(words) + f"\nfile {number} of {domain}\n")
    return [str(tmp_path / "corpus" / domain) for domain in ("left", "right")]
