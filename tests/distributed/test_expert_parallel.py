"""Experts spread over processes, tokens on their way to them: losses, gradients and steps are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_sharded_trainer import STEPS, _curve, _expected, _go_on, _resume, _save_and_go_on, _trainer
from test_sharded_trainer import _check as _check_steps
from test_wrapped_models import _check, _check_unused, _model, _model_of_one_expert, _own_part, _three_segments
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.distributed.ranks import Ranks
from moduleformer_ext.distributed.sharding import check_expert_mesh, shard_model
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.train.trainer import compile_blocks

UNEVEN = {"n_mlp_experts": [3, 5], "n_att_experts": [4, 2], "k_mlp": 2, "activation_function": "geglu"}
"""Fewer experts on some of two processes, none on some of four."""
FEW = {"n_mlp_experts": [1, 5], "k_mlp": 1}
"""None on one of two processes, which others share the experts with."""


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def _shard(model: MoLMForCausalLM, experts: int, **options: Any) -> None:
    model.set_routing_group(dist.group.WORLD)
    size = dist.get_world_size()
    expert_mesh = init_device_mesh("cpu", (size // experts, experts), mesh_dim_names=("data", "expert"))
    shard_model(model, init_device_mesh("cpu", (size,)), expert_mesh=expert_mesh, **options)


def _gradients(changes: dict[str, Any], experts: int, options: dict[str, Any]) -> dict[str, Tensor | None]:
    model = _model(dtype=torch.float32, **changes)
    _shard(model, experts, **options)
    return _three_segments(model, model, _own_part())


@pytest.mark.parametrize(
    ("changes", "options", "experts"),
    [({}, {}, 2), (UNEVEN, {"reshard": False}, 4), ({**FEW, "recompute": True}, {}, 2)],
)
def test_gradients_are_those_of_one_process(
    four: Ranks, changes: dict[str, Any], options: dict[str, Any], experts: int
) -> None:
    expected = _model(dtype=torch.float32, **changes)
    gradients = _three_segments(expected, expected, slice(None))
    for found in four.run(_gradients, changes, experts, options):
        _check(found, gradients)


INSERTED = ({"trainable": "new", "routing_penalty": 0.1}, {"n_new_mlp_experts": 3})
BETWEEN = {"n_mlp_experts": [3, 5], "n_att_experts": 3, "ffd_hidden": 13}


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({}, {}),
        ({"activation_checkpointing": True}, BETWEEN),
        INSERTED,
        pytest.param(
            {"trainable": "experts"},
            {"n_head": 1, "att_hidden": 16, "aux_loss_type": "switch"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_same_curve_as_one_process(pair: Ranks, four: Ranks, options: dict[str, Any], model: dict[str, Any]) -> None:
    expected = _expected(options, model)
    for ranks, experts in ((pair, 2), (four, 2), (four, 4)):
        curves = ranks.run(_curve, {**options, "expert_parallel": experts}, model)
        assert all(curve == curves[0] for curve in curves)
        _check_steps(curves[0], expected)
    assert ranks.run(_curve, {**options, "expert_parallel": experts}, model) == curves  # bit for bit


def test_same_curve_in_bfloat16(pair: Ranks) -> None:
    options = {"dtype": "bf16", "gather_dtype": "bf16", "expert_parallel": 2}
    _check_steps(pair.run(_curve, options, {})[0], _expected({"dtype": "bf16"}, {}), 0.03)


@pytest.mark.parametrize(("options", "model"), [({}, BETWEEN), pytest.param(*INSERTED, marks=pytest.mark.slow)])
def test_checkpoints_go_to_any_other_mesh(
    pair: Ranks, four: Ranks, tmp_path: Path, options: dict[str, Any], model: dict[str, Any]
) -> None:
    spread = {**options, "expert_parallel": 4}
    results = four.run(_save_and_go_on, tmp_path, spread, model, 2)[0]
    assert four.run(_resume, tmp_path, spread, model)[0] == results[2:]  # bit for bit
    for ranks, experts in ((four, 2), (pair, 2), (pair, 1)):
        _check_steps(ranks.run(_resume, tmp_path, {**options, "expert_parallel": experts}, model)[0], results[2:])
    _check_steps(_go_on(_trainer(options, model), tmp_path), results[2:])
    assert len(results) == STEPS


def _one_expert(experts: int) -> dict[str, Tensor | None]:
    """One process holds it."""
    model = _model_of_one_expert()
    _shard(model, experts)
    return _three_segments(model, model, _own_part())


def test_experts_without_tokens_have_zero_gradients(four: Ranks) -> None:
    for found in four.run(_one_expert, 2):
        _check_unused(found)


def _without_tokens() -> tuple[list[int], Tensor]:
    """One process has tokens for the experts of both."""
    model = _model(dtype=torch.float32)
    _shard(model, 2)
    output = model.eval()(IDS[: 2 * (dist.get_rank() == 0)])
    return list(output.logits.shape), output.logits.detach()


def test_a_process_without_tokens_serves_the_others(pair: Ranks) -> None:
    (_, logits), (shape, _) = pair.run(_without_tokens)
    torch.testing.assert_close(logits, _model(dtype=torch.float32).eval()(IDS).logits)
    assert shape == [0, *logits.shape[1:]]


def _saved(folder: Path) -> Tensor:
    model = _model(dtype=torch.float32, **UNEVEN)
    _shard(model, 4)
    model.save_pretrained(folder)
    return model.eval().generate(IDS, 5)


def test_spread_models_generate_and_are_saved(four: Ranks, tmp_path: Path) -> None:
    model = _model(dtype=torch.float32, **UNEVEN).eval()
    expected = model.generate(IDS, 5)
    assert all(torch.equal(found, expected) for found in four.run(_saved, tmp_path))
    saved = MoLMForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def _compiled() -> dict[str, Tensor | None]:
    model = _model(dtype=torch.float32)
    compile_blocks(model)
    _shard(model, 2)
    return _three_segments(model, model, _own_part())


@pytest.mark.slow
def test_compiled_blocks(pair: Ranks) -> None:
    expected = _model(dtype=torch.float32)
    gradients = _three_segments(expected, expected, slice(None))
    for found in pair.run(_compiled):
        _check({name.replace("_orig_mod.", ""): grad for name, grad in found.items()}, gradients)


def test_a_mesh_that_does_not_fit_is_refused() -> None:
    config = MoLMConfig.preset("molm-nano", n_embd=18)
    with pytest.raises(ValueError, match="n_embd must be a multiple of the 4 processes that share each expert, got 18"):
        check_expert_mesh(config, 4)
