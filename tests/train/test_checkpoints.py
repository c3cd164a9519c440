import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_array
from safetensors.numpy import save_file as save_array
from safetensors.torch import load_file, save_file

from moduleformer_ext.train.checkpoints import CheckpointStore
from moduleformer_ext.train.metrics import MetricsLog


def _write(step: int, path: Path) -> None:
    save_file({"step": torch.full((4,), step)}, path / "a.safetensors")


def test_store_keeps_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    for step in (5, 10, 100):
        store.save(step, lambda path, step=step: _write(step, path))
    assert store.steps() == [10, 100]
    latest = store.latest()
    assert latest is not None
    assert load_file(latest / "a.safetensors")["step"].tolist() == [100] * 4


def test_a_failed_save_leaves_the_one_before(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, lambda path: _write(1, path))

    def fail(path: Path) -> None:
        _write(2, path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.save(2, fail)
    assert os.listdir(tmp_path) == ["step-00000001"]


def _save_forever(root: Path, told: int) -> None:
    """Both files of a checkpoint say which step it is of: a torn one would differ or not load. Every save is told."""
    store = CheckpointStore(root)
    for step in itertools.count((store.steps() or [0])[-1] + 1):

        def write(path: Path, step: int = step) -> None:
            save_array({"step": np.full(200_000, step)}, path / "a.safetensors")
            (path / "b.json").write_text(str(step))

        store.save(step, write)
        os.write(told, b".")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_kill_during_saves_never_corrupts(tmp_path: Path) -> None:
    generator = random.Random(0)
    store = CheckpointStore(tmp_path)
    last = 0
    for saves in [0, 1, 2] * 13:
        heard, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _save_forever(tmp_path, told)  # until killed
            finally:
                os._exit(1)
        os.close(told)
        for _ in range(saves):  # however long they take
            assert os.read(heard, 1) == b".", "the child died by itself"
        time.sleep(generator.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(heard)
        steps = store.steps()
        for step in steps:
            path = tmp_path / f"step-{step:08d}"
            assert np.unique(load_array(path / "a.safetensors")["step"]).tolist() == [step]
            assert json.loads((path / "b.json").read_text()) == step
        assert len(steps) <= store.keep + 1
        assert (steps or [0])[-1] >= last + saves
        last = (steps or [0])[-1]


def test_metrics_rewind_drops_later_steps_and_torn_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        log.append(step=step, loss=1.0 / step)
    with log.path.open("a") as file:
        file.write('{"step": 40, "lo')
    log.rewind(20)
    assert [record["step"] for record in log.read()] == [10, 20]
    log.append(step=30)
    assert len(log.path.read_text().splitlines()) == 3
