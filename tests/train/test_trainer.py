from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moduleformer_ext.data import LaneReader
from moduleformer_ext.models import MoLMConfig
from moduleformer_ext.train import TrainConfig, Trainer

STREAM = {"d": np.random.default_rng(0).integers(0, 50, 500).astype(np.uint16)}


def _trainer(dtype: str = "fp32", batch_size: int = 2, **model: object) -> Trainer:
    config = TrainConfig(steps=8, batch_size=batch_size)
    fields = {"n_embd": 16, "n_layer": 2, "att_hidden": 16, "ffd_hidden": 16, "gating_size": 8, "vocab_size": 50}
    architecture = MoLMConfig.preset("molm-nano", **{**fields, "aux_loss_weight": 0.01, "history_length": 20, **model})
    return Trainer(config, architecture, LaneReader(STREAM, {"d": batch_size}, 12), steps=8, dtype=dtype)


def _state(trainer: Trainer) -> dict[str, Tensor]:
    return {
        **dict(trainer.model.named_parameters()),
        **trainer._moments(),
        **trainer._history_tensors(),
        "rng": torch.get_rng_state(),
    }


def _assert_same(trainer: Trainer, other: dict[str, Tensor]) -> None:
    own = _state(trainer)
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"n_head": 2},  # keys and values of their own
        {"resid_pdrop": 0.1, "sample_topk": 1},  # uses the random state
    ],
)
@pytest.mark.parametrize("saved_at", [0, 1, 4])
def test_resuming_equals_going_on(tmp_path: Path, dtype: str, model: dict[str, object], saved_at: int) -> None:
    straight = _trainer(dtype, **model)
    for step in range(7):
        if step == saved_at:
            straight.save(tmp_path)
        straight.take_step()
    expected = {name: tensor.detach().clone() for name, tensor in _state(straight).items()}
    expected_result = straight.take_step()

    resumed = _trainer(dtype, **model)
    torch.manual_seed(1234)
    resumed.load(tmp_path)
    assert resumed.step == saved_at
    while resumed.step < 7:
        resumed.take_step()
    _assert_same(resumed, expected)
    assert resumed.take_step() == expected_result


def test_history_is_the_detached_past(tmp_path: Path) -> None:
    trainer = _trainer()
    for _ in range(3):
        trainer.take_step()
    assert trainer.history is not None
    assert trainer.history.length == 20
    for tensor in trainer._history_tensors().values():
        assert not tensor.requires_grad


def test_loss_is_that_of_every_next_token() -> None:
    trainer = _trainer()
    inputs, targets = LaneReader(STREAM, {"d": 2}, 12).next()
    with torch.no_grad():
        logits = trainer.model(inputs).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert trainer.take_step().loss == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_loss() -> None:
    trainer = _trainer()
    trainer.steps = 60
    losses = [trainer.take_step().loss for _ in range(60)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05


def test_decay_spares_vectors() -> None:
    decayed, spared = _trainer().optimizer.param_groups
    assert decayed["weight_decay"] > 0
    assert spared["weight_decay"] == 0
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim < 2 for parameter in spared["params"])


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer = _trainer()
    trainer.take_step()
    trainer.save(tmp_path)
    with pytest.raises(ValueError, match=r"of another model; these are missing or of another shape: .*experts\.weight"):
        _trainer(ffd_hidden=24).load(tmp_path)
    with pytest.raises(ValueError, match="has dtype fp32, but the run has bf16"):
        _trainer("bf16").load(tmp_path)


@pytest.mark.parametrize("name", ["trainer.json", "trainer.safetensors"])
@pytest.mark.parametrize("damage", ["absent", "torn"])
def test_damaged_checkpoint_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    trainer = _trainer()
    trainer.take_step()
    trainer.save(tmp_path)
    if damage == "absent":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read"):
        _trainer().load(tmp_path)


def test_gradient_that_is_not_finite_stops_the_run() -> None:
    trainer = _trainer()
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"gradient of step 0 is not finite .* lower learning_rate than 0.002"):
        trainer.take_step()


@pytest.mark.parametrize("saved_at", [0, 2])
def test_resuming_with_frozen_experts_equals_going_on(tmp_path: Path, saved_at: int) -> None:
    """Only new experts train: their parameters are split in memory, whole on disk."""

    def make() -> Trainer:
        config = TrainConfig(steps=8, batch_size=2, trainable="new", routing_penalty=0.1, routing_penalty_kind="share")
        fields = {"n_embd": 16, "n_layer": 2, "att_hidden": 16, "ffd_hidden": 16, "gating_size": 8, "vocab_size": 50}
        architecture = MoLMConfig.preset("molm-nano", **fields, n_new_att_experts=1, n_new_mlp_experts=2)
        return Trainer(config, architecture, LaneReader(STREAM, {"d": 2}, 12), steps=8, dtype="fp32")

    straight = make()
    for step in range(4):
        if step == saved_at:
            straight.save(tmp_path)
        straight.take_step()
    resumed = make()
    resumed.load(tmp_path)
    while resumed.step < 4:
        resumed.take_step()
    _assert_same(resumed, _state(straight))
    assert {name for name, p in straight.model.named_parameters() if p in straight.optimizer.state} == {
        name for name, _ in straight.model.named_parameters() if name.endswith("_new")
    }
