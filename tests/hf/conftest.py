"""Small models in both forms. Nothing here asks the network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Starting threads takes longer than these models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["linear", "identity"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model of ours and the same for transformers, in evaluation mode, of both kinds of keys and values."""
    from hf_models import make_pair
    from small_models import IDENTITY_KV

    return make_pair(**(IDENTITY_KV if request.param == "identity" else {}))
