"""Steps of several processes are those of one with all lanes; checkpoints go from any number of them to any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.distributed.ranks import Ranks
from moduleformer_ext.data import LaneReader, TokenStream
from moduleformer_ext.distributed import Processes
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM, shards
from moduleformer_ext.models.shards import described_shards
from moduleformer_ext.train import TrainConfig, Trainer, evaluate
from moduleformer_ext.train.checkpoints import CheckpointStore
from moduleformer_ext.train.sharded import ShardedTrainer
from moduleformer_ext.train.trainer import StepResult

STREAM = {"d": np.random.default_rng(0).integers(0, 50, 700).astype(np.uint16)}
LANES, STEPS = 4, 6
MODEL = {
    "n_embd": 16,
    "n_layer": 2,
    "att_hidden": 32,
    "n_head": 2,
    "ffd_hidden": 12,
    "gating_size": 8,
    "vocab_size": 50,
}
UNEVEN = {"n_mlp_experts": [3, 5], "n_att_experts": 3, "gate_type": "gmm", "ffd_hidden": 13}
"""Dimensions that 4 does not divide, and a parameter of one number."""


def _trainer(options: dict[str, Any], model: dict[str, Any], processes: Processes | None = None) -> Trainer:
    options = dict(options)
    dtype = options.pop("dtype", "fp32")
    config = TrainConfig.from_dict({"steps": STEPS, "batch_size": LANES, **options})
    fields = {**MODEL, "vocab_size": 50, "aux_loss_weight": 0.5, "history_length": 20, **model}
    architecture = MoLMConfig.preset("molm-nano", **fields)
    if processes is None:
        reader = LaneReader(STREAM, {"d": LANES}, 12)
        return Trainer(config, architecture, reader, steps=STEPS, dtype=dtype)
    reader = LaneReader(STREAM, {"d": LANES}, 12, processes.own_part(LANES))
    return ShardedTrainer(config, architecture, reader, processes, steps=STEPS, dtype=dtype)


def _processes() -> Processes:
    size = dist.get_world_size()
    return Processes(dist.get_rank(), size, init_device_mesh("cpu", (size,)))


def _curve(options: dict[str, Any], model: dict[str, Any]) -> list[StepResult]:
    trainer = _trainer(options, model, _processes())
    return [trainer.take_step() for _ in range(STEPS)]


def _expected(options: dict[str, Any], model: dict[str, Any]) -> list[StepResult]:
    trainer = _trainer(options, model)
    return [trainer.take_step() for _ in range(STEPS)]


def _check(found: list[StepResult], expected: list[StepResult], tolerance: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert own == pytest.approx(other, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({}, {}),
        ({}, UNEVEN),
        ({"activation_checkpointing": True, "reshard": False}, {"aux_loss_type": "switch"}),
        ({"trainable": "new", "routing_penalty": 0.1}, {"n_new_mlp_experts": 2}),
        (
            {"trainable": "new", "routing_penalty": 0.1, "routing_penalty_kind": "share", "train_embedding": True},
            {"n_new_att_experts": 1},
        ),
        ({"trainable": "experts", "routing_penalty": 0.1}, {"n_new_mlp_experts": 2}),
        ({"trainable": "experts"}, {"n_head": 1, "att_hidden": 16, "tie_word_embeddings": True}),
    ],
)
def test_same_curve_for_any_number_of_processes(
    pair: Ranks, four: Ranks, options: dict[str, Any], model: dict[str, Any]
) -> None:
    expected = _expected(options, model)
    for ranks in (pair, four):
        curves = ranks.run(_curve, options, model)
        assert all(curve == curves[0] for curve in curves)
        _check(curves[0], expected)
    assert pair.run(_curve, options, model)[0] == pair.run(_curve, options, model)[0]  # bit for bit


@pytest.mark.parametrize("gather_dtype", ["fp32", "bf16"])
def test_same_curve_in_bfloat16(pair: Ranks, gather_dtype: str) -> None:
    options = {"dtype": "bf16", "gather_dtype": gather_dtype}
    _check(pair.run(_curve, options, {})[0], _expected({"dtype": "bf16"}, {}), 0.03)


def test_micro_batches_of_one_process_and_of_two(pair: Ranks) -> None:
    whole, options = _expected({}, {"aux_loss_type": "none"}), {"micro_batches": 2}
    _check(_expected(options, {"aux_loss_type": "none"}), whole)
    _check(pair.run(_curve, options, {"aux_loss_type": "none"})[0], whole)


def test_routing_loss_of_each_process_is_another(pair: Ranks) -> None:
    options = {"routing_loss_over": "process"}
    own = pair.run(_curve, options, {"gate_type": "gmm"})[0]
    expected = _expected({}, {"gate_type": "gmm"})
    assert abs(own[0].aux_loss - expected[0].aux_loss) > 1e-4
    assert own[0].loss == pytest.approx(expected[0].loss, rel=1e-5)


def _save_and_go_on(folder: Path, options: dict[str, Any], model: dict[str, Any], saved_at: int) -> list[StepResult]:
    trainer = _trainer(options, model, _processes())
    store, results = CheckpointStore(folder), []
    for step in range(STEPS):
        if step == saved_at:
            store.save(step, trainer.save, trainer.processes)
        results.append(trainer.take_step())
    store.finish()
    return results


def _resume(folder: Path, options: dict[str, Any], model: dict[str, Any]) -> list[StepResult]:
    trainer = _trainer(options, model, _processes())
    return _go_on(trainer, folder)


def _go_on(trainer: Trainer, folder: Path) -> list[StepResult]:
    checkpoint = CheckpointStore(folder).latest()
    assert checkpoint is not None
    trainer.load(checkpoint)
    return [trainer.take_step() for _ in range(STEPS - trainer.step)]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("model", "saved_at"), [({}, 0), (UNEVEN, 3)])
def test_checkpoint_of_two_processes(
    pair: Ranks, four: Ranks, tmp_path: Path, model: dict[str, Any], saved_at: int, background: bool
) -> None:
    options = {"background_checkpoints": background}
    (results, other) = pair.run(_save_and_go_on, tmp_path, options, model, saved_at)
    assert results == other
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{saved_at:08d}"]
    rest = results[saved_at:]
    assert pair.run(_resume, tmp_path, options, model)[0] == rest  # bit for bit
    _check(four.run(_resume, tmp_path, options, model)[0], rest)
    _check(_go_on(_trainer({}, model), tmp_path), rest)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_checkpoint_of_one_process_is_continued_by_two(pair: Ranks, tmp_path: Path, micro_batches: int) -> None:
    options, model = {"micro_batches": micro_batches}, {**UNEVEN, "aux_loss_type": "none"}
    trainer = _trainer(options, model)
    for _ in range(3):
        trainer.take_step()
    CheckpointStore(tmp_path).save(3, trainer.save)
    rest = [trainer.take_step() for _ in range(STEPS - 3)]
    _check(pair.run(_resume, tmp_path, options, model)[0], rest)
    assert _go_on(_trainer(options, model), tmp_path) == rest


RANDOM = {"resid_pdrop": 0.2, "sample_topk": 1}


def test_random_draws_continue(pair: Ranks, four: Ranks, tmp_path: Path) -> None:
    results = pair.run(_save_and_go_on, tmp_path, {}, RANDOM, 2)[0]
    assert pair.run(_resume, tmp_path, {}, RANDOM)[0] == results[2:]
    assert len(four.run(_resume, tmp_path, {}, RANDOM)[0]) == STEPS - 2


def _saved_and_whole(folder: Path) -> dict[str, Tensor]:
    trainer = _trainer({"trainable": "new"}, {"n_new_mlp_experts": 2}, _processes())
    trainer.take_step()
    CheckpointStore(folder).save(1, trainer.save, trainer.processes)
    trainer.model.save_pretrained(folder.parent / "whole")
    return {}


@pytest.mark.filterwarnings("error")
def test_shards_are_read_as_a_model(pair: Ranks, tmp_path: Path) -> None:
    pair.run(_saved_and_whole, tmp_path / "checkpoints")
    model = MoLMForCausalLM.from_pretrained(tmp_path / "checkpoints" / "step-00000001")
    whole = MoLMForCausalLM.from_pretrained(tmp_path / "whole")
    assert model.config == whole.config
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())


def _refusal(folder: Path, model: dict[str, Any]) -> str:
    processes = _processes()
    trainer = _trainer({}, model, processes)
    checkpoint = CheckpointStore(folder).latest()
    assert checkpoint is not None
    try:
        processes.together(lambda: trainer.load(checkpoint))
    except ValueError as error:
        return str(error)
    raise AssertionError("it was taken")


def test_wrong_checkpoints_are_refused_alike(pair: Ranks, tmp_path: Path) -> None:
    pair.run(_save_and_go_on, tmp_path, {}, {}, 1)
    first, second = pair.run(_refusal, tmp_path, {"ffd_hidden": 20})
    assert first == second
    assert "is of another model; these are missing or of another shape: " in first
    checkpoint = tmp_path / "step-00000001"
    shards = sorted((checkpoint / "shards").glob("shard-00002-*"))
    assert len(shards) == 5
    for shard in shards:
        content = shard.read_bytes()
        shard.write_bytes(content[: len(content) // 2])
        first, second = pair.run(_refusal, tmp_path, {})
        assert first == second and "does not hold whole shards" in first
        shard.unlink()
        first, second = pair.run(_refusal, tmp_path, {})
        assert first == second and ("does not hold whole shards" in first or "of another model" in first)
        shard.write_bytes(content)
    scalars = json.loads((checkpoint / "trainer.json").read_text())
    (checkpoint / "trainer.json").write_text(json.dumps({**scalars, "steps": 9}))
    first, second = pair.run(_refusal, tmp_path, {})
    assert first == second and first.endswith("has steps 9, but the run has 6")


def test_damaged_shards_are_refused_by_one_process(
    pair: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.run(_save_and_go_on, tmp_path, {}, {}, 1)
    checkpoint = tmp_path / "step-00000001"
    names = sorted(path.name for path in (checkpoint / "shards").iterdir())
    contents = {name: (checkpoint / "shards" / name).read_bytes() for name in names}

    def refusal(*lost: str) -> str:
        for name, content in contents.items():
            (checkpoint / "shards" / name).write_bytes(content)
        for name in lost:
            (checkpoint / "shards" / name).unlink()
        with pytest.raises(ValueError, match="step-00000001") as error:
            MoLMForCausalLM.from_pretrained(checkpoint)
        return str(error.value)

    assert "it must have files shard-...-model-...-of-....safetensors, got none" in refusal(*names)
    assert "must have files of 5 kinds, got none of kind 2" in refusal(
        *(name for name in names if "model-00002" in name)
    )
    assert "elements, got " in refusal(names[0])
    assert "rng.cpu must have 2 pieces, got 1" in refusal(names[-1])

    def lost_meanwhile(directory: Path) -> Any:
        found = described_shards(directory)
        for path in (directory / "shards").glob("*model-00002*"):
            path.unlink()
        return found

    monkeypatch.setattr(shards, "described_shards", lost_meanwhile)
    for name, content in contents.items():
        (checkpoint / "shards" / name).write_bytes(content)
    with pytest.raises((OSError, ValueError), match=r"checkpoint: '.*step-00000001': process 0: "):
        MoLMForCausalLM.from_pretrained(checkpoint)


def _failing_save(folder: Path) -> str:
    processes = _processes()

    def write(path: Path) -> None:
        (path / f"{processes.rank}").touch()
        if processes.rank == 1:
            raise OSError("disk full")

    try:
        CheckpointStore(folder).save(1, write, processes)
    except OSError as error:
        return str(error)
    raise AssertionError("it was saved")


def test_a_save_that_fails_on_one_fails_on_all(pair: Ranks, tmp_path: Path) -> None:
    assert pair.run(_failing_save, tmp_path) == ["disk full", "disk full"]
    assert list(tmp_path.iterdir()) == []


def _evaluate(size: int) -> float:
    processes = Processes(dist.get_rank(), size, init_device_mesh("cpu", (size,)))
    trainer = _trainer({}, {}, processes)
    stream = TokenStream(np.arange(11, dtype=np.uint16), num_bytes=11, num_documents=1)
    return evaluate(
        trainer.model, {"short": stream}, batch_size=4, segment_length=12, dtype="fp32", processes=processes
    )["short"].bits


def test_a_text_with_fewer_lanes_than_processes_is_evaluated(pair: Ranks) -> None:
    first, second = pair.run(_evaluate, 2)
    assert first == second and 0 < first < float("inf")
