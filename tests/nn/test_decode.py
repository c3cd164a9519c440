"""Decoding by two ops a block: the bits of the modules one by one, and these wherever more than weights matters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_hooks import CALLED, GATES, Scaled, every_module
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moduleformer_ext import ops
from moduleformer_ext.nn import (
    Block,
    LayerCache,
    MixtureOfAttention,
    MixtureOfFFN,
    QuantisedExpertLinear,
    StaticLayerCache,
    make_router,
)
from moduleformer_ext.nn import block as block_module
from moduleformer_ext.nn.segments import split_parameter
from moduleformer_ext.quantised import BITS, quantise

D, E = 32, 4
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def build(gate_type: str = "mlp", n_head: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> Block:
    torch.manual_seed(0)

    def router() -> Any:
        return make_router(gate_type, D, E, 2, gating_size=8, **options)  # type: ignore[arg-type]

    block = Block(D, MixtureOfAttention(D, D, n_head, router()), MixtureOfFFN(D, 12, router()), dropout=0.5)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block.to(dtype).eval()


def tokens(batch: int, length: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the two ops, as often as they are called."""
    names: list[str] = []
    for op in (ops.attention_layer_decode, ops.ffn_layer_decode):
        monkeypatch.setattr(ops, op.__name__, lambda *a, op=op, **k: names.append(op.__name__) or op(*a, **k))
    return names


@contextmanager
def module_by_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(block_module, "decode", lambda *_: None)
        yield


@torch.no_grad()
def past_of(block: Block, batch: int = 2) -> LayerCache:
    return block(tokens(batch, 5, block.ln_1.weight.dtype, seed=1), use_cache=True)[2]


@torch.no_grad()
def steps(block: Block, past: Any, batch: int = 2, length: int = 1) -> list[Tensor]:
    """All that a block returns for three steps."""
    results = []
    for step in range(3):
        x = tokens(batch, length, block.ln_1.weight.dtype, seed=step)
        y, routes, past = block(x, past, use_cache=True)
        results += [y, *routes.attention, *routes.ffn, past.keys.clone()]
    return results


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@torch.no_grad()
def assert_changes_are_seen(
    block: Block,
    past: LayerCache,
    changes: list[Callable[[], Any]],
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After each change the block still decodes by the two ops, to what its changed modules make."""
    for change in changes:
        steps(block, past)
        change()
        with module_by_module(monkeypatch):
            expected = steps(block, past.select(torch.arange(2)))
        calls.clear()
        assert_same(steps(block, past.select(torch.arange(2))), expected)
        assert len(calls) == 6


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n_head", [1, 2], ids=["identity", "linear"])
@pytest.mark.parametrize("gate_type", GATES)
def test_the_bits_of_the_modules(
    gate_type: str, n_head: int, dtype: torch.dtype, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = build(gate_type, n_head, dtype)
    for batch, length in ((1, 1), (2, 3)):
        past = past_of(block, batch)
        static = [StaticLayerCache.of(past, 20) for _ in range(2)]
        with module_by_module(monkeypatch):
            expected = [steps(block, cache, batch, length) for cache in (past.select(torch.arange(batch)), static[0])]
        assert not calls
        for cache, results in zip((past, static[1]), expected, strict=True):
            assert_same(steps(block, cache, batch, length), results)
            assert calls == ["attention_layer_decode", "ffn_layer_decode"] * 3
            calls.clear()


def scaled(value: Tensor) -> Tensor:
    return value / 2 if value.is_floating_point() else value.clone()


def with_quantised_experts(block: Block, bits: int) -> Block:
    for parent in (block.attn.q_proj, block.mlpf):
        for name in ("experts", "output_experts"):
            matrices = quantise(getattr(parent, name).weight, bits)
            experts = QuantisedExpertLinear(E, matrices.in_features, matrices.out_features, bits)
            experts.values.copy_(matrices.values)
            experts.scales.copy_(matrices.scales)
            setattr(parent, name, experts)
    return block.eval()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", TYPES[1:])
@pytest.mark.parametrize("n_head", [1, 2], ids=["identity", "linear"])
def test_the_bits_of_modules_with_quantised_experts(
    n_head: int, dtype: torch.dtype, bits: int, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = with_quantised_experts(build(n_head=n_head, dtype=dtype), bits)
    past = past_of(block)
    with module_by_module(monkeypatch):
        expected = steps(block, past.select(torch.arange(2)))
    assert not calls
    assert_same(steps(block, past), expected)
    assert len(calls) == 6


@pytest.mark.parametrize("bits", BITS)
def test_changed_quantised_experts_are_seen(bits: int, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    block, other = (with_quantised_experts(build(), bits) for _ in range(2))
    past = past_of(block)
    for parent in (other.attn.q_proj, other.mlpf):
        for experts in (parent.experts, parent.output_experts):
            experts.scales.mul_(2)
    changes: list[Callable[[], Any]] = [
        lambda: block.load_state_dict(other.state_dict()),
        lambda: block.load_state_dict({name: scaled(value) for name, value in block.state_dict().items()}, assign=True),
        lambda: setattr(block.mlpf.experts, "scales", block.mlpf.experts.scales * 2),
        lambda: setattr(block.mlpf, "experts", other.mlpf.experts),
        lambda: setattr(block.mlpf, "experts", build().mlpf.experts),
    ]
    assert_changes_are_seen(block, past, changes, calls, monkeypatch)


def test_routes_are_made_where_they_are_wanted() -> None:
    block = build()
    x, past = tokens(2, 1), past_of(build())
    with torch.no_grad():
        for cache in (None, past):
            y, routes, _ = block(x, cache)
            assert routes is not None
            without, none, present = block(x, cache, output_routes=False)
            assert none is None and present is None
            assert torch.equal(y, without)


def test_two_continuations_of_one_past() -> None:
    block, x = build(), tokens(2, 1)
    past = past_of(block)
    before = past.keys.clone()
    with torch.no_grad():
        first, second = (block(x * factor, past, use_cache=True)[2] for factor in (1, 2))
        again = block(x, past, use_cache=True)[2]
    assert past.length == 5 and torch.equal(past.keys, before)
    assert torch.equal(first.keys, again.keys)
    assert torch.equal(first.keys[:, :5], second.keys[:, :5]) and not torch.equal(first.keys, second.keys)


def not_served(block: Block, calls: list[str], monkeypatch: pytest.MonkeyPatch, past: Any = None) -> None:
    """Whatever was done to the block, its step has the bits of its modules, called one by one."""
    past = past_of(block) if past is None else past
    with module_by_module(monkeypatch):
        expected = steps(block, past.select(torch.arange(2)))
    calls.clear()
    assert_same(steps(block, past), expected)
    assert not calls


@pytest.mark.parametrize("n_head", [1, 2], ids=["identity", "linear"])
@pytest.mark.parametrize("gate_type", GATES)
def test_hooks_and_replaced_forwards(gate_type: str, n_head: int, calls: list[str]) -> None:
    block = build(gate_type, n_head)
    expected = steps(block, past_of(block))
    for name in [*every_module(gate_type), "ln_2"]:
        seen: list[str] = []
        module = block.get_submodule(name)
        handles = [
            module.register_forward_pre_hook(lambda *_, s=seen: s.append("before")),
            module.register_forward_hook(lambda *_, s=seen: s.append("after")),
        ]
        past = past_of(block)
        seen.clear(), calls.clear()
        torch.testing.assert_close(steps(block, past), expected, msg=name)
        assert seen[:2] == ["before", "after"] and not calls, name
        for handle in handles:
            handle.remove()
        module.forward = lambda *a, m=module, s=seen, **k: s.append("forward") or type(m).forward(m, *a, **k)
        past = past_of(block)
        seen.clear(), calls.clear()
        torch.testing.assert_close(steps(block, past), expected, msg=name)
        assert seen and not calls, name
        del module.forward
    assert_same(steps(block, past_of(block)), expected)
    assert calls


def test_a_hook_of_all_modules(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        not_served(build(), calls, monkeypatch)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("gate_type", "name", "weight"),
    [
        *((gate, f"{site}.gate.{CALLED[gate][-1]}", "weight") for gate in GATES for site in ("mlpf", "attn.q_proj")),
        ("mlp", "mlpf.gate.w_gate.0", "bias"),
        ("gmm", "mlpf.gate", "expert_centroids"),
        ("gmm", "attn.q_proj.gate", "temperature"),
        ("mlp", "mlpf.experts", "weight"),
        ("mlp", "attn.q_proj.output_experts", "weight"),
        ("mlp", "attn.k_proj", "weight"),
        ("mlp", "attn.v_proj", "bias"),
        ("mlp", "ln_1", "weight"),
        ("mlp", "ln_2", "bias"),
    ],
)
def test_parametrised_weights(
    gate_type: str, name: str, weight: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = build(gate_type)
    steps(block, past_of(block))
    scale = Scaled().float()
    parametrize.register_parametrization(block.get_submodule(name), weight, scale)
    not_served(block, calls, monkeypatch)
    with torch.no_grad():  # nothing of it is remembered
        scale.factor.mul_(0.5)
    not_served(block, calls, monkeypatch)


class Replacement(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.module(x)


CHANGES: dict[str, Callable[[Block], Any]] = {
    "an adapter": lambda b: setattr(b.attn, "k_proj", Replacement(b.attn.k_proj)),
    "an adapter of the router": lambda b: b.mlpf.gate.w_gate.__setitem__(0, Replacement(b.mlpf.gate.w_gate[0])),
    "dropout": lambda b: b.resid_dropout.train(),
    "dropout of the router": lambda b: b.mlpf.gate.w_gate[2].train(),
    "training": lambda b: b.train(),
    "a norm of another type": lambda b: b.ln_1.double(),
}


@pytest.mark.parametrize("change", ["an adapter", "an adapter of the router"])
def test_replaced_modules(change: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    block = build()
    steps(block, past_of(block))
    CHANGES[change](block)
    not_served(block, calls, monkeypatch)


@pytest.mark.parametrize("change", ["dropout", "dropout of the router", "training"])
def test_dropout(change: str, calls: list[str]) -> None:
    block = build(dropout=0.5)
    past = past_of(block)
    CHANGES[change](block)
    steps(block, past)
    assert not calls


def test_padded_heads(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    router = [make_router("mlp", 12, E, 2, gating_size=8) for _ in range(2)]
    block = Block(12, MixtureOfAttention(12, 12, 1, router[0]), MixtureOfFFN(12, 12, router[1])).eval()
    with torch.no_grad():
        past = block(torch.randn(2, 5, 12), use_cache=True)[2]
        block(torch.randn(2, 1, 12), past)
    assert not calls


def test_modes_in_which_modules_are_called(calls: list[str]) -> None:
    block, x = build(), tokens(2, 1)
    past = past_of(block)
    block(x, past)  # gradients
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            block(x, past)
        block(tokens(3, 3), past_of(block, 3))  # many tokens
        block(x, LayerCache())  # no past
        block(x)
    assert not calls


def _doubled(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        parameter.mul_(2)
    return other


def test_changed_weights_are_seen(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    block = build()
    past = past_of(block)
    changes: list[Callable[[], Any]] = [
        lambda: block.mlpf.experts.weight.mul_(2),
        lambda: setattr(block.attn.q_proj.experts, "weight", nn.Parameter(block.attn.q_proj.experts.weight * 2)),
        lambda: block.load_state_dict({name: value / 2 for name, value in block.state_dict().items()}),
        lambda: setattr(block, "mlpf", _doubled(block.mlpf)),
        lambda: split_parameter(block.mlpf.experts, "weight", 1),
        lambda: split_parameter(block.mlpf.gate.w_gate[3], "weight", 1),
        lambda: setattr(block.mlpf.gate, "k", 1),
        lambda: setattr(block.attn, "stick_epsilon", 0.5),
        lambda: setattr(block.ln_2, "eps", 0.1),
    ]
    assert_changes_are_seen(block, past, changes, calls, monkeypatch)


@torch.no_grad()
def test_copies_have_weights_of_their_own(calls: list[str]) -> None:
    block, x = build(), tokens(2, 1)
    past = past_of(block)
    y = block(x, past)[0]
    other = copy.deepcopy(block)
    block.mlpf.output_experts.weight.mul_(2)
    assert torch.equal(other(x, past)[0], y)
    assert not torch.equal(block(x, past)[0], y)
    assert len(calls) == 6


def test_converted_models(calls: list[str]) -> None:
    block = build()
    steps(block, past_of(block))
    calls.clear()
    block.to(torch.bfloat16)
    steps(block, past_of(block))
    assert len(calls) == 6


@torch.no_grad()
def test_pasts_that_do_not_fit_are_refused_as_ever() -> None:
    block = build()
    for past, message in (
        (past_of(block, 3), r"LayerCache: keys must be \[3, T, 2, 16\], got \[2, 1, 2, 16\]"),
        (StaticLayerCache.of(past_of(block, 3), 9), r"StaticLayerCache: keys must be \[3, T, 2, 16\]"),
        (past_of(build(n_head=1)), "LayerCache: keys must be"),
    ):
        with pytest.raises(ValueError, match=message):
            block(tokens(2, 1), past)
    with torch.inference_mode():
        past = StaticLayerCache.of(past_of(block), 9)
    with pytest.raises(ValueError, match="made in inference mode, must be continued in it"):
        block(tokens(2, 1), past)
    full = StaticLayerCache.of(past_of(block), 5)
    with pytest.raises(ValueError, match="cache_lengths must leave room for 1 tokens in k_cache's 5, got 5 at index 0"):
        block(tokens(2, 1), full)
