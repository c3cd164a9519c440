"""The model against the oracle: hidden states, logits, losses and the gradient of every parameter."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from small_models import BASE, IDENTITY_KV, random_state
from torch import Tensor

from moduleformer_ext.models import MoLMForCausalLM

VARIANTS = [
    pytest.param({"gate_type": "mlp"}, id="mlp"),
    pytest.param({"gate_type": "linear", **IDENTITY_KV}, id="linear-identity"),
    pytest.param({"gate_type": "gmm", "aux_loss_type": "switch", "activation_function": "relu"}, id="gmm-switch"),
    pytest.param({"gate_type": "mlp", "aux_loss_type": "switch", **IDENTITY_KV}, id="mlp-switch-identity"),
    pytest.param({"gate_type": "gmm", "k_mlp": 5, "k_att": 1, "n_head": 4}, id="gmm-all-experts"),
    pytest.param({"gate_type": "linear", "n_head": 3, "att_hidden": 15}, id="odd-heads"),
    pytest.param({"gate_type": "linear", "n_embd": 20, "n_head": 1, "att_hidden": 20}, id="odd-identity"),
]
MASKS = {
    "none": None,
    "left": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    "middle": torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]),
}


def build(changes: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor], MoLMForCausalLM]:
    config = {**BASE, **changes}
    state = random_state(config)
    model = MoLMForCausalLM.from_reference(config, {name: tensor.to(dtype) for name, tensor in state.items()})
    return config, {name: tensor.requires_grad_() for name, tensor in state.items()}, model


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    """Relative to the largest element, or to 1 for scalars, which are sums that cancel: 1e-10, 1e-5 in float32."""
    tolerance = 1e-10 if actual.dtype == torch.float64 else 1e-5
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0 / expected.numel())
    assert error < tolerance, f"{what}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("changes", VARIANTS)
def test_forward_and_gradients(changes: dict[str, Any], mask: str, dtype: torch.dtype) -> None:
    config, params, model = build(changes, dtype)
    ids = torch.randint(config["vocab_size"], (2, 5), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 2] = -100
    expected = oracle.language_model(params, config, ids, MASKS[mask])
    output = model(ids, attention_mask=MASKS[mask], labels=labels, output_hidden_states=True)

    assert output.hidden_states is not None and output.loss is not None
    for i, (state, wanted) in enumerate(zip(output.hidden_states, expected.hidden_states, strict=True)):
        assert_near(state, wanted, f"hidden state {i}")
    assert_near(output.uncast_logits, expected.logits, "logits")
    assert output.logits.dtype == torch.float32
    assert_near(output.aux_loss, expected.aux_loss, "aux_loss")
    wanted_loss = oracle.loss(expected, config, labels)
    assert output.loss.dtype == dtype
    assert output.loss.item() == pytest.approx(wanted_loss.item(), rel=1e-7 if dtype == torch.float64 else 1e-5)

    weight = torch.randn(expected.logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ((expected.logits * weight).sum() + expected.aux_loss).backward()
    ((output.uncast_logits * weight.to(dtype)).sum() + output.aux_loss).backward()
    for name, parameter in model.named_parameters():
        wanted_grad = params[name].grad
        assert parameter.grad is not None and wanted_grad is not None, name
        assert_near(parameter.grad, wanted_grad, name)


@pytest.mark.parametrize("changes", VARIANTS[:2])
def test_history_and_its_gradients(changes: dict[str, Any]) -> None:
    config, params, model = build(changes, torch.float64)
    model.train()
    first, second = torch.randint(config["vocab_size"], (2, 2, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 1, 1, 1] + [1] * 4, [1] * 8])
    start = oracle.language_model(params, config, first, mask[:, :4])
    expected = oracle.language_model(params, config, second, mask, start.past)
    past = model(first, attention_mask=mask[:, :4], use_cache=True).past_key_values
    output = model(second, attention_mask=mask, past_key_values=past)
    assert_near(output.uncast_logits, expected.logits, "logits")
    expected.logits.sin().sum().backward()
    output.uncast_logits.sin().sum().backward()
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, params[name].grad, name)


@pytest.mark.parametrize("changes", VARIANTS)
def test_cached_decoding(changes: dict[str, Any]) -> None:
    config, params, model = build(changes, torch.float64)
    ids = torch.randint(config["vocab_size"], (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        expected = oracle.language_model(params, config, ids, mask).logits
        output = model(ids[:, :3], attention_mask=mask[:, :3], use_cache=True)
        steps = [output.uncast_logits]
        for t in range(3, 6):
            output = model(
                ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            steps.append(output.uncast_logits)
    assert_near(torch.cat(steps, 1), expected, "logits")


def test_a_double_model_is_float64_throughout() -> None:
    _, _, model = build({}, torch.float32)
    output = model.double()(torch.arange(5)[None], labels=torch.arange(5)[None], use_cache=True, output_routes=True)
    assert output.past_key_values is not None and output.routes is not None and output.loss is not None
    tensors = [output.last_hidden_state, output.uncast_logits, output.aux_loss, output.loss]
    tensors += [tensor for pair in output.past_key_values for tensor in pair]
    tensors += [t for block in output.routes for r in block for t in r if t.is_floating_point()]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}


def test_all_labels_ignored_is_nan_as_published() -> None:
    _, _, model = build({}, torch.float64)
    ids = torch.arange(4)[None]
    assert model(ids, labels=torch.full_like(ids, -100)).loss.isnan()
