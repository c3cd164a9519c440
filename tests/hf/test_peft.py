"""LoRA on experts, routers and projections: it acts, trains, merges, is saved and loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from hf_models import make_pair, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from moduleformer_ext import hf
from moduleformer_ext.hf.modeling import CACHE

EXPERTS = ["mlpf.experts.weight", "mlpf.output_experts.weight", "q_proj.experts.weight", "q_proj.output_experts.weight"]
TARGETS: dict[str, dict[str, Any]] = {
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "routers": {"target_modules": r".*\.gate\.w_gate\.[03]"},
    "projections": {"target_modules": ["k_proj", "v_proj"]},
    "everything": {"target_modules": r".*(\.gate\.w_gate\.[03]|k_proj|v_proj|lm_head)", "target_parameters": EXPERTS},
}
_GATES, _EXPERTS = r".*w_gate\.[03]\.weight", r".*experts\.weight"
_PROJECTIONS = r".*[kv]_proj\.weight"
CHANGED = {
    "experts": _EXPERTS,
    "routers": _GATES,
    "projections": _PROJECTIONS,
    "everything": rf"lm_head\.weight|{_GATES}|{_EXPERTS}|{_PROJECTIONS}",
}


def adapted(targets: str, **changes: Any) -> tuple[Any, Any, Any]:
    """Our model, the same with an adapter, and the loss and step of its training."""
    native, model = make_pair(aux_loss_weight=0.1, **changes)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **TARGETS[targets]))
    return native, model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)


def train(model: Any, optimizer: Any, x: Tensor) -> list[float]:
    losses = []
    for _ in range(8):
        loss = model(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_train_merge_save_and_load(targets: str, tmp_path: Path) -> None:
    native, model, optimizer = adapted(targets)
    x = tokens(4, 12)
    torch.testing.assert_close(model(x).logits, native(x).uncast_logits)  # LoRA begins as nothing
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, optimizer, x)
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not p.requires_grad)
    model.eval()
    trained = model(x).logits
    assert (trained - native(x).uncast_logits).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(model(x).logits, native(x).uncast_logits)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_pair(aux_loss_weight=0.1)[1], tmp_path).eval()
    torch.testing.assert_close(again(x).logits, trained)

    merged = again.merge_and_unload()
    assert type(merged) is hf.ModuleFormerForCausalLM
    torch.testing.assert_close(merged(x).logits, trained, rtol=1e-5, atol=1e-5)
    ours = hf.to_native(merged)
    assert torch.equal(ours(x).uncast_logits, merged(x).logits)
    state = native.state_dict()
    changed = {name for name, weight in ours.state_dict().items() if not torch.equal(weight, state[name])}
    assert changed == {name for name in state if re.fullmatch(CHANGED[targets], name)}


@pytest.mark.parametrize("changes", [{"n_head": 1, "att_hidden": 16}, {"gate_type": "linear"}])
def test_adapted_models_generate(changes: dict[str, Any]) -> None:
    native, model, optimizer = adapted("experts", **changes)
    x = tokens(2, 8)
    train(model, optimizer, x)
    model.eval()
    generated = model.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=8, do_sample=False)
    merged = hf.to_native(model.merge_and_unload())
    assert torch.equal(generated, merged.generate(x, 8))
    assert not torch.equal(generated, native.generate(x, 8))


def test_checkpointing_with_adapters() -> None:
    gradients = []
    for checkpointing in (False, True):
        _, model, _ = adapted("everything")
        if checkpointing:
            model.train().gradient_checkpointing_enable()
            model.enable_input_require_grads()
        x = tokens(2, 8)
        output = model(input_ids=x, labels=x)
        output.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_unmerged_adapters_are_no_model_of_ours() -> None:
    _, model, _ = adapted("experts")
    with pytest.raises(ValueError, match="do not fit the configuration"):
        hf.to_native(model.base_model.model)


def test_a_classifier_with_an_adapter(tmp_path: Path) -> None:
    _, language = make_pair()
    language.save_pretrained(tmp_path / "base")
    options = {"num_labels": 3, "pad_token_id": 0}
    model = hf.ModuleFormerForSequenceClassification.from_pretrained(tmp_path / "base", **options)
    config = LoraConfig(task_type="SEQ_CLS", r=2, **TARGETS["experts"])
    model = get_peft_model(model, config)
    x, labels = tokens(3, 8).clamp(min=1), torch.tensor([0, 1, 2])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    first = None
    for _ in range(8):
        loss = model(input_ids=x, labels=labels).loss
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 0.1
    model.save_pretrained(tmp_path / "adapter")
    base = hf.ModuleFormerForSequenceClassification.from_pretrained(tmp_path / "base", **options)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=x).logits, model.eval()(input_ids=x).logits)
    assert CACHE in model(input_ids=x)
