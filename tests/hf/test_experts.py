"""Mixture-of-experts models of transformers on our kernels: values and gradients of their own eager implementation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from moe_models import ALONE, FAMILIES, MUSE_SPARK, NEMOTRON_H, OURS, alone, assert_same, make, outcome, run, tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import moe

from moduleformer_ext.hf import experts as hf_experts


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_eager(family: str, calls: list[str]) -> None:
    expected = outcome(make(family))
    assert not calls
    assert_same(outcome(make(family, OURS)), expected)
    assert set(calls) == ({"grouped_gemm"} if family == "gpt_oss" else {"expert_ffn"})


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_bfloat16_is_as_accurate_as_eager(family: str) -> None:
    """Beyond the router, whose choices rounding may change: the experts alone."""
    module = next(m for m in make(family).modules() if type(m).__name__.endswith("Experts"))
    torch.manual_seed(3)
    x, ids = torch.randn(40, 32), torch.rand(40, 4).argsort(1)[:, :2]
    weights = torch.rand(40, 2)
    exact = module(x, ids, weights)
    low = copy.deepcopy(module).bfloat16()
    errors = [
        (f(low, x.bfloat16(), ids, weights.bfloat16()).float() - exact).norm() / exact.norm()
        for f in (type(module).forward.__wrapped__, hf_experts.experts_forward)
    ]
    assert errors[1] <= 1.2 * errors[0]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_saved_loaded_and_generated_with(family: str, tmp_path: Path) -> None:
    eager = make(family).eval()
    eager.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=OURS, dtype=torch.float32).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    assert torch.equal(model.generate(tokens(), **options), eager.generate(tokens(), **options))
    model.set_experts_implementation("eager")
    assert torch.equal(model(tokens()).logits, eager(tokens()).logits)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_weights_get_contiguous_gradients(family: str) -> None:
    model = make(family, OURS)
    outcome(model)
    gradients = [p.grad for name, p in model.named_parameters() if "experts" in name]
    assert gradients
    assert all(g.is_contiguous() for g in gradients)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_compiles_to_one_graph(family: str) -> None:
    model = make(family, OURS)
    module = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    x, ids, weights = torch.randn(9, 32), torch.rand(9, 4).argsort(1)[:, :2], torch.rand(9, 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ids, weights), module(x, ids, weights))


def test_autocast() -> None:
    model = make("mixtral", OURS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(tokens()).logits
    exact = model(tokens()).logits
    assert (low.float() - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("case", ALONE)
def test_other_kinds_of_experts(case: str, calls: list[str]) -> None:
    kind, config, used = ALONE[case]
    module = alone(kind, **config)
    torch.manual_seed(5)
    arguments = torch.randn(30, 16), torch.rand(30, 4).argsort(1)[:, :2], torch.rand(30, 2)
    expected = run(module, *arguments)
    module.config._experts_implementation = OURS
    for a, b in zip(run(module, *arguments), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert set(calls) == used


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_every_activation_that_the_op_has(name: str, calls: list[str]) -> None:
    module = alone(NEMOTRON_H, mlp_hidden_act=name)
    arguments = torch.randn(30, 16), torch.rand(30, 4).argsort(1)[:, :2], torch.rand(30, 2)
    expected = run(module, *arguments)
    module.config._experts_implementation = OURS
    for a, b in zip(run(module, *arguments), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert calls == ["expert_ffn"]


def test_experts_of_other_processes_count_nothing() -> None:
    module = alone(MUSE_SPARK).requires_grad_(False)
    module.has_post_expert_norm, module.config._experts_implementation = False, OURS
    x, ids, weights = torch.randn(8, 16), torch.tensor([[0, 4], [4, 4], [2, 3], [1, 4]] * 2), torch.rand(8, 2)
    expected = module(x, ids.clamp(max=3), weights.masked_fill(ids == 4, 0))
    module._is_expert_parallel = True
    torch.testing.assert_close(module(x, ids, weights), expected)


def test_weights_that_are_no_matrices_are_refused_by_name() -> None:
    module = make("mixtral", OURS).model.layers[0].mlp.experts
    module.down_proj = nn.Parameter(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"MixtralExperts.down_proj must be a plain tensor .*, got shape \[4, 6\]"):
        module(torch.zeros(2, 32), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))


def test_quantised_experts_are_refused_by_name() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    module = make("mixtral", OURS).model.layers[0].mlp.experts
    weight = module.gate_up_proj.detach()
    module.gate_up_proj = nn.Parameter(TwoTensor(weight, weight))
    with pytest.raises(ValueError, match=r"MixtralExperts.gate_up_proj must be a plain tensor .*, got TwoTensor"):
        module(torch.zeros(2, 32), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))


def test_the_name_is_registered() -> None:
    assert OURS in moe.ALL_EXPERTS_FUNCTIONS.valid_keys()
    with pytest.raises(ValueError, match="moduleformer_ext"):  # transformers' own error lists it
        make("mixtral", "no such implementation")


# ---- LoRA ----


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_lora_on_experts(family: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"], task_type="CAUSAL_LM"
    )
    results = {}
    for implementation in ("eager", OURS):
        torch.manual_seed(6)
        model = peft.get_peft_model(make(family, implementation), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
        results[implementation] = outcome(model)
        results[f"{implementation}, merged"] = {"logits": model.merge_and_unload()(tokens()).logits.detach()}
    assert any("lora_" in name for name in results[OURS])
    assert_same(results[OURS], results["eager"])
    assert_same(results[f"{OURS}, merged"], results["eager, merged"])
    plain = make(family)(tokens()).logits
    assert (results[OURS]["logits"] - plain).norm() / plain.norm() > 1e-2
