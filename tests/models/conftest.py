"""Fixtures for small random models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from small_models import IDENTITY_KV, random_model

from moduleformer_ext.models import MoLMForCausalLM


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """Starting threads takes longer than these models."""
    set_threads(1)


@pytest.fixture
def model() -> MoLMForCausalLM:
    return random_model()


@pytest.fixture(params=["linear", "identity"])
def any_model(request: pytest.FixtureRequest) -> MoLMForCausalLM:
    """Both kinds of keys and values."""
    return random_model(**(IDENTITY_KV if request.param == "identity" else {}))
