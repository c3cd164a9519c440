"""A model whose experts and heads are spread over processes computes what it computes on one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from small_models import IDENTITY_KV, random_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.distributed.ranks import Ranks
from moduleformer_ext.distributed.tensor_parallel import molm_tp_plan
from moduleformer_ext.models import MoLMForCausalLM

IDS = torch.arange(24).reshape(3, 8) * 7 % 31


class _Collectives(TorchDispatchMode):
    """Counts them; CommDebugMode hooks every module, which ours notice."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        self.number += func.namespace == "_c10d_functional" and not re.search("wait|wrap", func.__name__)
        return func(*args, **(kwargs or {}))


def _model(changes: dict[str, Any]) -> MoLMForCausalLM:
    return random_model(**changes).train()


def _parallel(changes: dict[str, Any]) -> MoLMForCausalLM:
    model = _model(changes)
    parallelize_module(model, init_device_mesh("cpu", (2,)), molm_tp_plan(model))
    return model


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _steps(model: MoLMForCausalLM) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Losses and gradients of two segments with history; the collectives of the second pass."""
    mask = torch.ones_like(IDS)
    first = model(IDS, labels=IDS, attention_mask=mask, use_cache=True)
    with _Collectives() as counted:
        second = model(IDS.flip(1), labels=IDS.flip(1), past_key_values=first.past_key_values)
    (first.loss + second.loss).backward()
    grads = {name: _whole(parameter.grad) for name, parameter in model.named_parameters()}
    return [first.loss.detach(), second.loss.detach(), second.logits.detach()], grads, counted.number


def _trained(changes: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor], int, dict[str, str]]:
    model = _parallel(changes)
    places = {name: str(p.placements[0]) for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert places.keys() == dict(model.named_parameters()).keys()
    return *_steps(model), places


GATED = {"activation_function": "geglu"}
KINDS: list[dict[str, Any]] = [{}, IDENTITY_KV, GATED, {"gate_type": "gmm", "tie_word_embeddings": True}]


@pytest.mark.parametrize("changes", KINDS)
def test_training(pair: Ranks, changes: dict[str, Any]) -> None:
    expected, gradients, _ = _steps(_model(changes))
    for found, grads, collectives, places in pair.run(_trained, changes):
        torch.testing.assert_close(found, expected)
        assert grads.keys() == gradients.keys()
        for name, grad in gradients.items():
            torch.testing.assert_close(grads[name], grad, msg=lambda text, name=name: f"{name}: {text}")
        layers = 2
        assert collectives == layers * (1 if changes == IDENTITY_KV else 2)
        h = "transformer.h.0."
        ffn = ("S(0)", "S(0)") if changes == GATED else ("S(2)", "S(1)")
        assert (places[f"{h}mlpf.experts.weight"], places[f"{h}mlpf.output_experts.weight"]) == ffn
        sharded = 4 + (0 if changes == IDENTITY_KV else 2 * 6)
        assert sum(place != "R" for place in places.values()) == sharded


def _updated(model: MoLMForCausalLM) -> dict[str, Tensor]:
    """Parameters after a clipped step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    return {name: _whole(parameter.detach()) for name, parameter in model.named_parameters()}


def _updated_in_parallel() -> dict[str, Tensor]:
    return _updated(_parallel({}))


def test_optimiser_and_clipping(pair: Ranks) -> None:
    expected = _updated(_model({}))
    for found in pair.run(_updated_in_parallel):
        torch.testing.assert_close(found, expected)


def _generated(changes: dict[str, Any]) -> Tensor:
    return _parallel(changes).eval().generate(IDS, 5)


@pytest.mark.parametrize("changes", [{}, IDENTITY_KV])
def test_generation(pair: Ranks, changes: dict[str, Any]) -> None:
    expected = _model(changes).eval().generate(IDS, 5)
    for found in pair.run(_generated, changes):
        assert torch.equal(found, expected)


def _refused(changes: dict[str, Any]) -> str:
    try:
        _parallel(changes)
    except ValueError as error:
        return str(error)
    return "none"


def test_what_cannot_be_divided(pair: Ranks) -> None:
    heads = {"n_head": 3, "att_hidden": 24}
    for changes, named in [(heads, "n_head"), ({"ffd_hidden": 11}, "ffd_hidden")]:
        size = changes[named]
        message = f"molm_tp_plan: {named} must be a multiple of the mesh's 2 processes, got {size}"
        assert pair.run(_refused, changes) == [message] * 2
