"""Small random models in the published format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM

BASE: dict[str, Any] = {
    "vocab_size": 31,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "att_hidden": 32,
    "ffd_hidden": 12,
    "n_att_experts": 4,
    "k_att": 2,
    "n_mlp_experts": 5,
    "k_mlp": 3,
    "gating_size": 8,
    "gate_type": "mlp",
    "activation_function": "gelu_new",
    "aux_loss_type": "mi",
    "aux_loss_weight": 0.1,
    "block_size": 8,
    "history_length": 8,
}
IDENTITY_KV = {"n_head": 1, "att_hidden": 16}


def random_state(config: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights of a published checkpoint, large enough for every part of the model to matter."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MoLMForCausalLM(MoLMConfig.from_reference(config)).named_parameters()}
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=torch.float64).mul(0.3).to(dtype) for name, shape in shapes.items()}


def random_model(dtype: torch.dtype = torch.float64, **changes: Any) -> MoLMForCausalLM:
    config = {**BASE, **changes}
    return MoLMForCausalLM.from_reference(config, random_state(config, dtype))
