import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moduleformer_ext.train.checkpoints import CheckpointStore
from moduleformer_ext.train.metrics import MetricsLog

# Two files of every checkpoint say which step they are of: a torn one would differ or not load.
SAVE_FOREVER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from moduleformer_ext.train.checkpoints import CheckpointStore

store = CheckpointStore(Path(sys.argv[1]))
step = (store.steps() or [0])[-1]
print("ready", flush=True)
while True:
    step += 1
    def write(path):
        save_file({"step": torch.full((200_000,), step)}, path / "a.safetensors")
        (path / "b.json").write_text(str(step))
    store.save(step, write)
"""


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


@pytest.mark.slow
def test_kill_during_saves_never_corrupts(tmp_path: Path) -> None:
    generator = random.Random(0)
    last = 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = CheckpointStore(tmp_path)
        for step in store.steps():
            path = tmp_path / f"step-{step:08d}"
            assert load_file(path / "a.safetensors")["step"].unique().tolist() == [step]
            assert json.loads((path / "b.json").read_text()) == step
        newest = (store.steps() or [0])[-1]
        assert newest >= last
        assert len(store.steps()) <= 3
        last = newest
    assert last > 0


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
