"""Mixture-of-experts models of transformers, small ones with values of their own, and experts modules by themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moduleformer_ext.hf import experts as hf_experts

OURS = hf_experts.NAME
COMMON = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = COMMON | {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
QWEN = MOE | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}
DEEPSEEK = MOE | {
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GLM4 = MOE | {"n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 0, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": QWEN,
    "qwen3_moe": QWEN | {"head_dim": 8, "norm_topk_prob": True},
    "olmoe": MOE,
    "granitemoe": COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": DEEPSEEK | {"topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": GLM4,
    "minimax_m2": MOE | {"num_local_experts": 6, "head_dim": 8},
    "gpt_oss": COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "jamba": COMMON
    | {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4},
}
ROUTED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")},
    "deepseek_v2": ("deepseek_v2", {"routed_scaling_factor": 1.5}),
    "deepseek_v2, by the best of a group": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    ),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3, groups": ("deepseek_v3", {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 0.7}),
    "glm4_moe": ("glm4_moe", {"n_group": 2, "topk_group": 1, "norm_topk_prob": True}),
    "minimax_m2": ("minimax_m2", {}),
}
"""Models whose routers can be replaced, too."""


def make(family: str, experts_implementation: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**(FAMILIES[family] | changes))
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts_implementation)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def tokens() -> Tensor:
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(2))


def outcome(model: nn.Module) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter."""
    x = tokens()
    out = model(input_ids=x, labels=x, use_cache=False)
    model.zero_grad()
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **gradients}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-6)
        assert error < tolerance, f"{name}: {error}"


NEMOTRON_H = "nemotron_h", "NemotronHExperts"
MUSE_SPARK = "muse_spark", "MuseSparkExperts"
PRIVACY_FILTER = "openai_privacy_filter", "OpenAIPrivacyFilterExperts"
STEP3P7 = "step3p7", "Step3p7Experts"
"""Of which transformers 5.17 lacks some."""


def alone(kind: tuple[str, str], **config: Any) -> nn.Module:
    """An experts module of a family that is too large for a test."""
    family, name = kind
    module_of = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    fields = {
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "moe_hidden_size": 16,
        "moe_latent_size": None,
        "hidden_act": "silu",
        "mlp_hidden_act": "relu2",
        "swiglu_alpha": 1.7,
        "swiglu_limit": 1.0,
        "post_norm_eps": 1e-5,
        "_experts_implementation": "eager",
    }
    torch.manual_seed(4)
    module = getattr(module_of, name)(SimpleNamespace(**(fields | config)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


ALONE: dict[str, tuple[tuple[str, str], dict[str, Any], set[str]]] = {
    "plain, activation of its own": (NEMOTRON_H, {}, {"grouped_gemm"}),
    "plain, activation of the op": (NEMOTRON_H, {"mlp_hidden_act": "gelu_new"}, {"expert_ffn"}),
    "biases, halves side by side, clamped": (PRIVACY_FILTER, {}, {"grouped_gemm"}),
    "norm behind every expert": (MUSE_SPARK, {}, {"grouped_gemm"}),
    "another activation, gated": (MUSE_SPARK, {"hidden_act": "quick_gelu"}, {"grouped_gemm"}),
}


def run(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    y = module(leaves[0], ids, leaves[1])
    inputs = [*leaves, *module.parameters()]
    return [y, *torch.autograd.grad(y.square().sum(), inputs)]
