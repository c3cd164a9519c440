"""Small models in both forms. Nothing here asks the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """Starting threads takes longer than these models."""
    set_threads(1)


@pytest.fixture(params=["linear", "identity"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model of ours and the same for transformers, in evaluation mode, of both kinds of keys and values."""
    from hf_models import make_pair
    from small_models import IDENTITY_KV

    return make_pair(**(IDENTITY_KV if request.param == "identity" else {}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our ops as they are called."""
    from moduleformer_ext import ops

    def recorded(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(op.__name__)
            return op(*args, **kwargs)

        return call

    seen: list[str] = []
    for name in ("expert_ffn", "grouped_gemm", "route_topk", "route_topk_linear"):
        monkeypatch.setattr(ops, name, recorded(getattr(ops, name)))
    return seen
