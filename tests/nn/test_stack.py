"""Decoding a whole stack of blocks by one op: the bits of the blocks one by one, and these wherever it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_hooks import Scaled
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM, modeling, quantise_experts
from moduleformer_ext.quantised import BITS


def build(**options: Any) -> MoLMForCausalLM:
    torch.manual_seed(0)
    config = MoLMConfig.preset("molm-nano").replace(
        **{
            "vocab_size": 64,
            "n_embd": 32,
            "att_hidden": 32,
            "ffd_hidden": 24,
            "gating_size": 8,
            "n_layer": 3,
            **options,
        }
    )
    model = MoLMForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


IDS = torch.arange(10).view(2, 5)


@torch.no_grad()
def steps(model: MoLMForCausalLM, *, static: bool = False, mask: Tensor | None = None, **options: Any) -> list[Tensor]:
    """What three steps after a prompt give, and what the cache holds."""
    past: Any = model(IDS, None if mask is None else mask[:, :5], use_cache=True).past_key_values
    if static:
        past = past.to_static(12)
    results = []
    for step in range(3):
        seen = None if mask is None else mask if static else mask[:, : 6 + step]
        ids = IDS[:, step : step + 1]
        output = model(ids, seen, past_key_values=past, use_cache=True, output_aux_loss=False, **options)
        past = output.past_key_values
        results += [output.logits, *(layer.keys.clone() for layer in past.layers)]
    return results


def block_by_block(model: MoLMForCausalLM, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "decode_stack", lambda *_: None)
        return steps(model, **options)


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize(
    "options", [{}, {"n_head": 2}, {"gate_type": "linear"}, {"n_layer": 1}, {"router_order": "topk_softmax"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_bits_of_the_blocks(
    options: dict[str, Any], dtype: torch.dtype, static: bool, stacks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(**options).to(dtype)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :2] = False
    for given in (None, mask):
        expected = block_by_block(model, monkeypatch, static=static, mask=given)
        assert not stacks
        assert_same(steps(model, static=static, mask=given), expected)
        assert stacks == [model.config.n_layer] * 3
        stacks.clear()


@pytest.mark.parametrize("bits", BITS)
def test_quantised_experts(bits: int, stacks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantise_experts(build(), bits)
    assert_same(steps(model), block_by_block(model, monkeypatch))
    assert stacks == [3] * 3


CHANGES: dict[str, Callable[[MoLMForCausalLM], Any]] = {
    "a weight in place": lambda m: m.transformer.h[2].mlpf.experts.weight.data.mul_(2),
    "a weight": lambda m: setattr(m.transformer.h[1].ln_2, "bias", nn.Parameter(torch.ones(32))),
    "a block": lambda m: m.transformer.h.__setitem__(1, build().transformer.h[2]),
    "one more block": lambda m: m.transformer.h.append(build().transformer.h[0]),
    "the state": lambda m: m.load_state_dict({k: v / 2 for k, v in m.state_dict().items()}, assign=True),
    "k of all": lambda m: [setattr(b.mlpf.gate, "k", 1) for b in m.transformer.h],
    "epsilon of all": lambda m: [setattr(b.attn, "stick_epsilon", 0.5) for b in m.transformer.h],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str, stacks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    steps(model)
    CHANGES[change](model)
    expected = block_by_block(model, monkeypatch)
    stacks.clear()
    assert_same(steps(model), expected)
    assert stacks == [len(model.transformer.h)] * 3


class _Adapter(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)


def _wrap(model: MoLMForCausalLM) -> None:
    model.transformer.h[1].attn.q_proj.experts = _Adapter(model.transformer.h[1].attn.q_proj.experts)


REASONS: dict[str, Callable[[MoLMForCausalLM], Any]] = {
    "k of one": lambda m: setattr(m.transformer.h[1].mlpf.gate, "k", 1),
    "epsilon of one": lambda m: setattr(m.transformer.h[1].attn, "stick_epsilon", 0.5),
    "a norm's epsilon": lambda m: setattr(m.transformer.h[2].ln_1, "eps", 0.1),
    "a hook of a block": lambda m: m.transformer.h[1].register_forward_hook(lambda *_: None),
    "a hook inside": lambda m: m.transformer.h[2].mlpf.gate.register_forward_pre_hook(lambda *_: None),
    "an adapter": _wrap,
    "a forward of its own": lambda m: setattr(m.transformer.h[0], "forward", m.transformer.h[0].forward),
    "a parametrised weight": lambda m: parametrize.register_parametrization(
        m.transformer.h[2].mlpf.experts, "weight", Scaled().float()
    ),
    "pruned experts": lambda m: setattr(
        m.transformer.h[0].mlpf.gate, "normaliser_rows", nn.Parameter(torch.ones(1, 8))
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_where_blocks_are_called(reason: str, stacks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    steps(model)
    REASONS[reason](model)
    expected = block_by_block(model, monkeypatch)
    stacks.clear()
    assert_same(steps(model), expected)
    assert not stacks


def test_temperatures_are_read_for_every_token(stacks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(gate_type="gmm")
    assert_same(steps(model), block_by_block(model, monkeypatch))
    assert not stacks


def test_what_is_between_blocks(stacks: list[int]) -> None:
    model = build()
    for options in ({"output_hidden_states": True}, {"output_routes": True}):
        steps(model, **options)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(IDS[:, :1], past_key_values=model(IDS, use_cache=True).past_key_values)
    past = model(IDS, use_cache=True).past_key_values
    model(IDS[:, :1], past_key_values=past, output_aux_loss=False)  # with gradients
    assert not stacks


def test_training_mode(stacks: list[int]) -> None:
    steps(build(moe_pdrop=0.5).train())
    assert not stacks


@torch.no_grad()
def test_two_continuations_of_one_past(stacks: list[int]) -> None:
    model = build()
    past = model(IDS, use_cache=True).past_key_values
    before = [layer.keys.clone() for layer in past.layers]
    options: dict[str, Any] = {"past_key_values": past, "use_cache": True, "output_aux_loss": False}
    first, second, again = (model(IDS[:, i : i + 1], **options) for i in (0, 1, 0))
    assert torch.equal(first.logits, again.logits) and not torch.equal(first.logits, second.logits)
    assert_same([layer.keys for layer in past.layers], before)
    assert len(stacks) == 3


@torch.no_grad()
def test_reordered_sequences(stacks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    past = model(IDS, use_cache=True).past_key_values.select(torch.tensor([1, 0]))
    options: dict[str, Any] = {"past_key_values": past, "use_cache": True, "output_aux_loss": False}
    actual = model(IDS[:, :1], **options).logits
    monkeypatch.setattr(modeling, "decode_stack", lambda *_: None)
    assert torch.equal(actual, model(IDS[:, :1], **options).logits)
    assert stacks == [3]


@torch.no_grad()
def test_a_full_static_cache_is_refused_and_unchanged() -> None:
    model = build()
    past = model(IDS, use_cache=True).past_key_values.to_static(5)
    before = [layer.keys.clone() for layer in past.layers]
    with pytest.raises(ValueError, match="block 0: cache_lengths must leave room for 1 tokens in k_cache's 5, got 5"):
        model(IDS[:, :1], past_key_values=past, output_aux_loss=False)
    assert_same([layer.keys for layer in past.layers], before)
