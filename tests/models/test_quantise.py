"""Models whose experts are integers of 8 or 4 bits."""

from __future__ import annotations

import json

import pytest
import torch
from small_models import IDENTITY_KV, random_model

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM, quantise_experts
from moduleformer_ext.nn import ExpertLinear, QuantisedExpertLinear
from moduleformer_ext.quantised import BITS, dequantise, quantise
from moduleformer_ext.surgery import insert_experts, merge, set_trainable

IDS = torch.tensor([[3, 17, 5, 9, 28, 1], [4, 4, 30, 2, 11, 8]])


def with_rounded_experts(model: MoLMForCausalLM, bits: int) -> MoLMForCausalLM:
    """The model with ordinary matrices of the same numbers."""
    state = {
        name: dequantise(quantise(tensor, bits)) if name.endswith("experts.weight") else tensor
        for name, tensor in model.state_dict().items()
    }
    return MoLMForCausalLM.from_state(model.config, state)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, IDENTITY_KV], ids=["", "tied", "identity_kv"])
@torch.no_grad()
def test_it_computes_what_its_numbers_say(changes, bits):
    model = random_model(torch.float32, **changes)
    quantised, expected = quantise_experts(model, bits), with_rounded_experts(model, bits)
    assert (model.config.expert_bits, quantised.config.expert_bits) == (None, bits)
    assert not quantised.training
    kinds = [type(module) for module in quantised.modules()]
    assert ExpertLinear not in kinds
    assert kinds.count(QuantisedExpertLinear) == 8
    torch.testing.assert_close(quantised(IDS).logits, expected(IDS).logits)
    assert torch.equal(quantised.generate(IDS, 5), expected.generate(IDS, 5))


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_files_and_types(bits, tmp_path):
    quantised = quantise_experts(random_model(torch.float32), bits)
    quantised.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["expert_bits"] == bits
    again = MoLMForCausalLM.from_pretrained(tmp_path)
    assert again.config == quantised.config
    assert torch.equal(again(IDS).logits, quantised(IDS).logits)
    halves = MoLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for model in (halves, quantised.to(torch.bfloat16)):
        experts = model.transformer.h[0].mlpf.experts
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert experts.values.dtype == torch.int8
        assert experts.scales.dtype == (torch.float32 if bits == 8 else torch.float16)
        assert torch.equal(experts.scales, again.transformer.h[0].mlpf.experts.scales)
    assert torch.equal(halves(IDS).logits, quantised(IDS).logits)


def test_numbers_of_another_type_are_no_weights_of_it():
    quantised = quantise_experts(random_model(torch.float32), 8)
    state = quantised.state_dict()
    name = "transformer.h.1.mlpf.experts.values"
    with pytest.raises(ValueError, match=rf"1 of the wrong type: {name} \(expected torch.int8, got torch.float32\)"):
        MoLMForCausalLM.from_state(quantised.config, state | {name: state[name].float()})


def test_what_needs_trained_experts_says_so():
    model = random_model(torch.float32)
    quantised = quantise_experts(model, 4)
    for name, call in {
        "quantise_experts": lambda: quantise_experts(quantised, 8),
        "insert_experts": lambda: insert_experts(quantised, ffn=1),
        "merge": lambda: merge(model, quantised),
        "set_trainable": lambda: set_trainable(quantised, "experts"),
    }.items():
        with pytest.raises(
            ValueError, match=f"^{name}: expert_bits must be None, got 4; take the model that it was made from"
        ):
            call()
    with pytest.raises(ValueError, match="to_reference: expert_bits must be None in the published format, got 4"):
        quantised.to_reference()
    with pytest.raises(ValueError, match="x must not require grad"):
        quantised(IDS)


def test_bits_are_8_or_4():
    with pytest.raises(ValueError, match="MoLMConfig: expert_bits must be None, 8 or 4, got 3"):
        MoLMConfig(expert_bits=3)
    with pytest.raises(ValueError, match="quantise: bits must be 8 or 4, got 2"):
        quantise_experts(random_model(torch.float32), 2)
