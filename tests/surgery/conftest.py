"""Small random models in float64, and the routing of any of them by brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM

BASE: dict[str, Any] = {
    "vocab_size": 31,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 1,
    "att_hidden": 16,
    "ffd_hidden": 12,
    "n_att_experts": 4,
    "k_att": 2,
    "n_mlp_experts": (5, 6),
    "k_mlp": 3,
    "gating_size": 8,
    "block_size": 8,
    "history_length": 8,
}
ModelMaker = Callable[..., MoLMForCausalLM]


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """Starting threads takes longer than these models."""
    set_threads(1)


@pytest.fixture
def make_model() -> ModelMaker:
    """Makes models whose weights are large enough for every part to matter."""

    def make(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> MoLMForCausalLM:
        torch.manual_seed(seed)
        model = MoLMForCausalLM(MoLMConfig.from_dict({**BASE, **changes})).to(dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        return model.eval()

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(31, (3, 10), generator=torch.Generator().manual_seed(5))
