"""A model under DDP and FSDP2 has the losses and gradients of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import IDENTITY_KV, random_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.distributed.ranks import Ranks
from moduleformer_ext.distributed.sharding import draw_weights, load_weights, shard_model
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.surgery import insert_experts, set_trainable

SEGMENTS = torch.arange(3 * 4 * 6).reshape(3, 4, 6) * 7 % 31


def _model(*, recompute: bool = False, dtype: torch.dtype = torch.float64, **changes: Any) -> MoLMForCausalLM:
    model = random_model(dtype, **changes).train()
    model.set_activation_checkpointing(recompute)
    return model


def _whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _three_segments(run: torch.nn.Module, model: MoLMForCausalLM, part: slice) -> dict[str, Tensor | None]:
    """Gradients after three segments with history."""
    history = None
    for segment in SEGMENTS:
        output = run(segment[part], labels=segment[part], past_key_values=history, use_cache=True)
        history = output.past_key_values
        output.loss.backward()
    return {name: _whole(parameter.grad) for name, parameter in model.named_parameters()}


def _own_part() -> slice:
    own = 4 // dist.get_world_size()
    return slice(dist.get_rank() * own, (dist.get_rank() + 1) * own)


def _check(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(found[name], grad, msg=lambda text, name=name: f"{name}: {text}")


def _trained(wrap: str, options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Tensor | None]:
    model = _model(**changes)
    model.set_routing_group(dist.group.WORLD)
    if wrap == "ddp":
        return _three_segments(DistributedDataParallel(model, **options), model, _own_part())
    shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)), **options)
    return _three_segments(model, model, _own_part())


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        ("ddp", {}),
        ("ddp", {"static_graph": True}),
        ("ddp", {"gradient_as_bucket_view": True}),
        ("fsdp", {"reshard": True}),
        ("fsdp", {"reshard": False}),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"recompute": True}, IDENTITY_KV, {"tie_word_embeddings": True}])
def test_gradients_with_history(pair: Ranks, changes: dict[str, Any], wrap: str, options: dict[str, Any]) -> None:
    dtype = torch.float64 if wrap == "ddp" else torch.float32
    expected = _model(dtype=dtype, **changes)
    gradients = _three_segments(expected, expected, slice(None))
    for found in pair.run(_trained, wrap, options, {"dtype": dtype, **changes}):
        _check(found, gradients)


GATED = {"gate_type": "gmm", "activation_function": "geglu", "n_mlp_experts": [3, 5], "mlp_normaliser_rows": [1, 0]}
FIRST = [{}, {"n_head": 1, "att_hidden": 16}, GATED, {"gate_type": "linear", "tie_word_embeddings": True}]


def _own(**changes: Any) -> MoLMConfig:
    fields = {"vocab_size": 31, "n_embd": 16, "att_hidden": 32, "n_head": 2, "ffd_hidden": 12, "gating_size": 8}
    return MoLMConfig.preset("molm-nano", **{**fields, **changes})


def _drawn(changes: dict[str, Any]) -> tuple[dict[str, Tensor | None], Tensor]:
    config = _own(**changes)
    with torch.device("meta"):
        model = MoLMForCausalLM(config)
    shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    draw_weights(model)
    state = torch.get_rng_state()
    return {name: _whole(parameter.detach()) for name, parameter in model.named_parameters()}, state


@pytest.mark.parametrize("changes", FIRST)
def test_first_weights_are_those_of_one_process(pair: Ranks, changes: dict[str, Any]) -> None:
    torch.manual_seed(5)
    expected = dict(MoLMForCausalLM(_own(**changes)).named_parameters())
    state = torch.get_rng_state()
    for found, found_state in pair.run(_drawn, changes):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
        assert torch.equal(found_state, state)


def _extended() -> MoLMForCausalLM:
    return insert_experts(_model(dtype=torch.float32), attention=2, ffn=3, seed=1).train()


def _frozen(part: str) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    whole = _extended()
    with torch.device("meta"):
        model = MoLMForCausalLM(whole.config)
    set_trainable(model, part)
    model.set_routing_group(dist.group.WORLD)
    shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    model.to_empty(device="cpu")
    load_weights(model, whole.state_dict().__getitem__)
    gradients = _three_segments(model, model, _own_part())
    return gradients, {name: _whole(parameter.detach()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("part", ["experts", "new"])
def test_frozen_parts_under_fsdp_from_the_meta_device(pair: Ranks, part: str) -> None:
    model = _extended()
    set_trainable(model, part)
    gradients = _three_segments(model, model, slice(None))
    assert any(grad is None for grad in gradients.values())
    for found, weights in pair.run(_frozen, part):
        _check(found, gradients)
        assert all(torch.equal(weights[name], weight) for name, weight in model.named_parameters())


def _model_of_one_expert() -> MoLMForCausalLM:
    """Its routers send every token to the same experts."""
    changes = {"n_att_experts": 6, "n_mlp_experts": 6, "gate_type": "linear", "k_att": 1, "k_mlp": 1}
    model = _model(dtype=torch.float32, **changes)
    with torch.no_grad():
        for block in model.transformer.h:
            block.ln_1.weight.zero_()
            block.ln_2.weight.zero_()  # tokens are the biases: all alike, and so are their experts
    return model


def _check_unused(gradients: dict[str, Tensor | None]) -> None:
    """Zeros for the five experts of a layer that no token reached."""
    for name, grad in gradients.items():
        assert grad is not None, name
        if "experts.weight" in name:
            assert len([expert for expert in range(6) if not grad[expert].any()]) == 5, name


def _one_expert(kind: str) -> dict[str, Tensor | None]:
    model = _model_of_one_expert()
    model.set_routing_group(dist.group.WORLD)
    if kind == "fsdp":
        shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return _three_segments(DistributedDataParallel(model) if kind == "ddp" else model, model, _own_part())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_experts_without_tokens_have_zero_gradients(pair: Ranks, kind: str) -> None:
    for found in pair.run(_one_expert, kind):
        _check_unused(found)


def _bfloat16() -> tuple[float, torch.dtype, bool]:
    model = _model(dtype=torch.float32)
    shard_model(model, init_device_mesh("cpu", (dist.get_world_size(),)), gather_dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(SEGMENTS[0][_own_part()], labels=SEGMENTS[0][_own_part()]).loss
    loss.backward()
    grad = model.transformer.h[0].mlpf.experts.weight.grad
    return loss.item(), grad.dtype, bool(grad.full_tensor().isfinite().all())


def test_fsdp_gathers_bfloat16(pair: Ranks) -> None:
    model = _model(dtype=torch.float32)
    for rank, (loss, dtype, finite) in enumerate(pair.run(_bfloat16)):
        own = SEGMENTS[0][2 * rank : 2 * rank + 2]
        assert loss == pytest.approx(model(own, labels=own).loss.item(), rel=0.02)
        assert dtype == torch.float32 and finite
