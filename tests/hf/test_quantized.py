"""torchao: weight-only linear layers work; quantised experts are refused in words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("torchao")

from hf_models import make_pair, tokens
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, TorchAoConfig

from moduleformer_ext import hf

WIDE = {"n_embd": 64, "att_hidden": 64, "ffd_hidden": 64, "gating_size": 32, "n_head": 2}
CONFIGS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


def dequantised(model: Any) -> Any:
    """The same model with plain weights that say what the quantised ones do."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        weight = module._parameters.get("weight")
        if weight is not None and hasattr(weight, "dequantize") and type(weight) is not torch.nn.Parameter:
            module.weight = torch.nn.Parameter(weight.dequantize())
    return plain


@pytest.mark.parametrize("routers", ["quantised", "whole"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_weight_only_linear_layers(kind: str, routers: str, tmp_path: Path) -> None:
    _, model = make_pair(**WIDE)
    model.save_pretrained(tmp_path)
    kept = [r".*\.gate"] if routers == "whole" else None
    config = TorchAoConfig(CONFIGS[kind], modules_to_not_convert=kept)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    quantised = {name for name, p in model.named_parameters() if type(p) is not torch.nn.Parameter}
    names = ["k_proj", "v_proj"] + ([] if kept else ["gate.w_gate.0", "gate.w_gate.3"])
    assert all(any(name in q for q in quantised) for name in names) and (
        kept is None or not any("gate" in q for q in quantised)
    )
    plain = dequantised(model)
    assert all(type(p) is torch.nn.Parameter for p in plain.parameters())
    x = tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, plain(x).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(x[:1, :1]).logits, plain(x[:1, :1]).logits, rtol=1e-4, atol=1e-4)
        assert (model(x).logits - make_pair(**WIDE)[1](x).logits).abs().max() > 1e-4
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(x)}
        assert torch.equal(model.generate(x, **options), plain.generate(x, **options))


def test_quantised_experts_are_refused() -> None:
    _, model = make_pair(**WIDE)
    experts = model.transformer.h[0].mlpf.experts
    linear = torch.nn.Linear(64, 64, bias=False)
    quantize_(linear, Int8WeightOnlyConfig())
    experts.weight = linear.weight
    with pytest.raises(TypeError, match="ExpertLinear: weight must be a plain tensor, got Int8Tensor; quantise"):
        model(tokens(1, 4))


def test_a_quantised_model_is_no_model_of_ours() -> None:
    _, model = make_pair(**WIDE)
    quantize_(model.transformer.h[0].attn.k_proj, Int8WeightOnlyConfig())
    with pytest.raises(
        ValueError, match=r"to_native: .* got quantised or distributed: transformer.h.0.attn.k_proj.weight"
    ):
        hf.to_native(model)
