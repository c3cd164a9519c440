"""A model of transformers decodes all its blocks by one op: the bits of its blocks one by one, and these wherever
somebody looks at what is between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import tokens
from torch import Tensor, nn
from transformers import DynamicCache

from moduleformer_ext import hf
from moduleformer_ext.hf import modeling

PROMPT, STEPS = 5, 3


def growing(model: Any) -> Any:
    return hf.ModuleFormerCache(model.config.n_layer)


def static(model: Any) -> Any:
    return hf.ModuleFormerStaticCache(model.config.n_layer, 12)


@torch.no_grad()
def steps(model: Any, make: Callable[[Any], Any] = growing, mask: Tensor | None = None, **options: Any) -> list[Tensor]:
    """What steps of a token after a prompt give, and what the cache holds in the end."""
    ids, cache = tokens(2, PROMPT + STEPS), make(model)
    results = []
    for start, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + STEPS))]:
        seen = None if mask is None else mask[:, :end]
        results.append(model(ids[:, start:end], attention_mask=seen, past_key_values=cache, **options).logits)
    held = [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return results + [tensor[:, :, : PROMPT + STEPS] for tensor in held]


def block_by_block(monkeypatch: pytest.MonkeyPatch, of: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "decode_stack", lambda *_, **__: None)
        return of()


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("make", [growing, static])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_the_blocks(
    pair: tuple[Any, Any],
    make: Callable[[Any], Any],
    dtype: torch.dtype,
    stacks: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pair[1].to(dtype)
    mask = torch.ones(2, PROMPT + STEPS, dtype=torch.long)
    mask[0, :2] = 0
    for given in (None, mask):
        expected = block_by_block(monkeypatch, lambda given=given: steps(model, make, given))
        assert not stacks
        assert_same(steps(model, make, given), expected)
        assert stacks == [2] * STEPS
        stacks.clear()


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}, {"prefill_chunk_size": 2}],
    ids=str,
)
def test_generation(
    pair: tuple[Any, Any], options: dict[str, Any], stacks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = pair
    x = tokens(2, 7)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(x),
    } | options
    expected = block_by_block(monkeypatch, lambda: model.generate(x, **options))
    assert not stacks
    assert torch.equal(model.generate(x, **options), expected)
    assert len(stacks) >= 5 and set(stacks) == {2}


def test_changed_weights_are_seen(pair: tuple[Any, Any], stacks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair
    steps(model)
    model.load_state_dict({name: weight / 2 for name, weight in model.state_dict().items()}, assign=True)
    model.transformer.h[1].ln_2.bias = nn.Parameter(torch.ones_like(model.transformer.h[1].ln_2.bias))
    expected = block_by_block(monkeypatch, lambda: steps(model))
    stacks.clear()
    assert_same(steps(model), expected)
    assert stacks == [2] * STEPS


class _Adapter(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)


class _Other(modeling.ModuleFormerBlock):
    """One whose forward may do anything."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options)


def adapt(model: Any) -> None:
    attention = model.transformer.h[1].attn
    attention.q_proj.experts = _Adapter(attention.q_proj.experts)


OBSERVED: dict[str, Callable[[Any], Any]] = {
    "a hook of a block": lambda m: m.transformer.h[1].register_forward_hook(lambda *_: None),
    "a hook inside": lambda m: m.transformer.h[0].mlpf.gate.register_forward_pre_hook(lambda *_: None),
    "a forward of its own": lambda m: setattr(m.transformer.h[0], "forward", m.transformer.h[0].forward),
    "a block of another class": lambda m: setattr(m.transformer.h[0], "__class__", _Other),
    "an adapter": adapt,
}


@pytest.mark.parametrize("reason", OBSERVED)
def test_observed_blocks_are_called(
    pair: tuple[Any, Any], reason: str, stacks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = pair
    steps(model)
    OBSERVED[reason](model)
    expected = block_by_block(monkeypatch, lambda: steps(model))
    stacks.clear()
    assert_same(steps(model), expected)
    assert not stacks


@pytest.mark.parametrize("option", ["output_hidden_states", "output_router_logits"])
def test_what_is_between_blocks(
    pair: tuple[Any, Any], option: str, stacks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = pair
    expected = steps(model)
    stacks.clear()
    assert_same(steps(model, **{option: True}), expected)
    setattr(model.config, option, True)
    assert_same(steps(model), expected)
    assert not stacks


def test_caches_of_transformers_and_gradients(pair: tuple[Any, Any], stacks: list[int]) -> None:
    _, model = pair
    ids, cache = tokens(2, PROMPT + STEPS), DynamicCache()
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        model(ids[:, PROMPT:], past_key_values=cache)
    cache = growing(model)
    model(ids[:, :PROMPT], past_key_values=cache)
    model(ids[:, PROMPT:], past_key_values=cache)
    assert not stacks


def test_a_draft_that_exits_early_calls_fewer_blocks(
    pair: tuple[Any, Any], stacks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = pair
    model.config.n_layer = 1
    expected = block_by_block(monkeypatch, lambda: steps(model))
    assert_same(steps(model), expected)
    assert not stacks
