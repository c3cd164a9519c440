"""Fixtures for small random models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_models import IDENTITY_KV, random_model

from moduleformer_ext.models import MoLMForCausalLM


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Starting threads takes longer than these models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> MoLMForCausalLM:
    return random_model()


@pytest.fixture(params=["linear", "identity"])
def any_model(request: pytest.FixtureRequest) -> MoLMForCausalLM:
    """Both kinds of keys and values."""
    return random_model(**(IDENTITY_KV if request.param == "identity" else {}))
