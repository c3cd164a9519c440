"""Trainer, accelerate and device maps with offloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf_models import make_pair, tokens, write_published
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moduleformer_ext import hf

DATA = [{"input_ids": tokens(16, seed=i), "labels": tokens(16, seed=i)} for i in range(12)]


def trainer(folder: Path, model: Any, **options: Any) -> Trainer:
    options = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    } | options
    return Trainer(model, TrainingArguments(str(folder), **options), train_dataset=DATA, eval_dataset=DATA[:4])


def test_train_evaluate_save_and_resume(tmp_path: Path) -> None:
    native, model = make_pair(aux_loss_weight=0.1)
    whole = trainer(tmp_path / "whole", model)
    x = torch.stack([d["input_ids"] for d in DATA[:4]])
    before = whole.evaluate()["eval_loss"]
    assert before == pytest.approx(native(x, labels=x).loss.item(), rel=1e-5)
    whole.train()
    assert whole.evaluate()["eval_loss"] < before - 0.1
    _, again = make_pair(aux_loss_weight=0.1)
    resumed = trainer(tmp_path / "whole", again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(saved(x).logits, model.eval()(x).logits)


@pytest.mark.parametrize(
    "options",
    [{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
    ids=["accumulation", "checkpointing"],
)
def test_the_same_steps_in_other_ways(options: dict[str, Any], tmp_path: Path) -> None:
    """Up to rounding; the routing loss of parts is not that of the whole, so that it is left out."""
    weights = []
    for changes in ({}, options):
        _, model = make_pair(aux_loss_weight=0.0)
        trainer(tmp_path, model, save_strategy="no", optim="sgd", **changes).train()
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, msg=name)
    _, start = make_pair()
    assert not torch.equal(start.state_dict()["lm_head.weight"], weights[0]["lm_head.weight"])


def test_the_routing_loss_is_part_of_it(tmp_path: Path) -> None:
    """A large one changes where routers go, and weighs the same however a batch is cut."""
    routers = []
    for weight, accumulated in ((0.0, 1), (5.0, 1), (5.0, 2)):
        _, model = make_pair(aux_loss_weight=weight)
        options = {"per_device_train_batch_size": 2 // accumulated, "gradient_accumulation_steps": accumulated}
        run = trainer(tmp_path, model, save_strategy="no", optim="sgd", max_steps=1, **options)
        run.train()
        routers.append(model.transformer.h[0].mlpf.gate.w_gate[3].weight.detach())
    without, whole, parts = routers
    step = (whole - without).norm()
    assert step > 1e-4 and (parts - whole).norm() < 0.5 * step


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_offloaded_blocks(where: str, tmp_path: Path) -> None:
    native = write_published(tmp_path, "sharded safetensors")
    device_map: dict[str, Any] = {"transformer.wte": "cpu", "transformer.drop": "cpu", "transformer.ln_f": "cpu"}
    device_map |= {"transformer.h.0": "cpu", "transformer.h.1": where, "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "off")
    assert model.transformer.h[1].mlpf.experts.weight.is_meta == (where == "disk")
    x = tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, native(x).uncast_logits)
        generated = model.generate(x, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(x))
    assert torch.equal(generated, native.generate(x, 5, eos_token_id=[]))


def test_accelerate_prepares_it(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    native, model = make_pair()
    AcceleratorState._reset_state(reset_partial_state=True)  # the Trainer's
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    x = tokens(2, 9)
    output = prepared(x, labels=x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = native(x, labels=x)
    torch.testing.assert_close(output.loss.float(), expected.loss.float(), rtol=1e-2, atol=1e-2)
    accelerator.backward(output.loss)
    optimizer.step()
    accelerator.unwrap_model(prepared).save_pretrained(tmp_path, save_function=accelerator.save)
    saved = hf.ModuleFormerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight)
    AcceleratorState._reset_state(reset_partial_state=True)
