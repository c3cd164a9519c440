"""Decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import random_model

from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.models.generation import sample
from moduleformer_ext.surgery import count_usage

PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def greedy_by_hand(model: MoLMForCausalLM, ids: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_greedy_equals_full_recomputation(any_model: MoLMForCausalLM) -> None:
    assert torch.equal(any_model.generate(PROMPT, 6), greedy_by_hand(any_model, PROMPT, 6))


def test_stream_yields_what_generate_returns(any_model: MoLMForCausalLM) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 10, "top_p": 0.9, "seed": 5}
    stream = list(any_model.generate_stream(PROMPT, 4, **options))
    assert torch.equal(torch.stack(stream, 1), any_model.generate(PROMPT, 4, **options)[:, 5:])
    assert not torch.equal(torch.stack(stream, 1), any_model.generate(PROMPT, 4, **{**options, "seed": 6})[:, 5:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single_prompts(any_model: MoLMForCausalLM, side: str) -> None:
    short = PROMPT[:1, :3]
    alone = [any_model.generate(short, 5)[:, 3:], any_model.generate(PROMPT[1:], 5)[:, 5:]]
    pad, mask = torch.zeros(1, 2, dtype=torch.long), torch.ones(2, 5)
    mask[0, :2] = 0
    row = torch.cat([pad, short], 1)
    if side == "right":
        row, mask[0] = torch.cat([short, pad], 1), mask[0].flip(0)
    together = any_model.generate(torch.cat([row, PROMPT[1:]]), 5, attention_mask=mask)[:, 5:]
    assert torch.equal(together, torch.cat(alone))


def test_ended_sequences_are_padded_and_the_stream_stops(model: MoLMForCausalLM) -> None:
    free = model.generate(PROMPT, 8)[:, 5:]
    eos = int(free[0, 1])
    out = model.generate(PROMPT, 8, eos_token_id=eos, pad_token_id=30)[:, 5:]
    for row, unstopped in zip(out.tolist(), free.tolist(), strict=True):
        end = unstopped.index(eos) if eos in unstopped else len(unstopped)
        assert row[: end + 1] == unstopped[: end + 1][: len(row)]
        assert all(token == 30 for token in row[end + 1 :])
    assert model.generate(PROMPT[:1], 8, eos_token_id=eos).shape[1] == 5 + free[0].tolist().index(eos) + 1


def test_generation_leaves_mode_and_grad_mode_alone(model: MoLMForCausalLM) -> None:
    model.train()
    for token in model.generate_stream(PROMPT, 3):
        assert torch.is_grad_enabled() and not token.requires_grad
    assert model.training
    # longer than history_length: what is cut in training is kept here
    assert torch.equal(model.generate(PROMPT, 9), greedy_by_hand(model.eval(), PROMPT, 9))


def test_no_new_tokens(model: MoLMForCausalLM) -> None:
    assert torch.equal(model.generate(PROMPT, 0), PROMPT)


def test_sampling_follows_the_distribution() -> None:
    probs = torch.tensor([0.05, 0.5, 0.15, 0.3])
    logits = probs.log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options: Any) -> torch.Tensor:
        drawn = sample(logits, generator=generator, **options)
        return torch.bincount(drawn, minlength=4) / len(logits)

    def expect(actual: torch.Tensor, expected: list[float]) -> None:
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=0.015, rtol=0)

    expect(frequencies(temperature=1.0), probs.tolist())
    expect(frequencies(temperature=0.0), [0, 1, 0, 0])
    expect(frequencies(temperature=1.0, top_k=2), [0, 0.625, 0, 0.375])
    expect(frequencies(temperature=1.0, top_p=0.7), [0, 0.625, 0, 0.375])
    expect(frequencies(temperature=1.0, top_p=0.01), [0, 1, 0, 0])
    squared = probs**2 / (probs**2).sum()
    expect(frequencies(temperature=0.5), squared.tolist())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0 and finite, got -1.0"),
        ({"temperature": float("inf")}, "temperature must be >= 0 and finite, got inf"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be >= 1"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"seed": 1, "generator": torch.Generator()}, "exclude"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask must be"),
        ({"attention_mask": torch.zeros(2, 5)}, "at least one token"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        random_model().generate(PROMPT, 2, **options)


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_every_module_gets_its_own_mode_back() -> None:
    model = random_model(moe_pdrop=0.5).train()
    model.transformer.h[0].eval()
    model.transformer.h[1].mlpf.gate.eval()
    before = modes(model)
    assert len(set(before)) == 2
    model.generate(PROMPT, 2)
    assert modes(model) == before
    count_usage(model, [PROMPT])
    assert modes(model) == before
    with pytest.raises(IndexError):
        model.generate(torch.full((1, 3), 31), 2)
    assert modes(model) == before


def test_interleaved_streams_run_in_evaluation_mode_and_leave_training_mode() -> None:
    model = random_model(moe_pdrop=0.5, resid_pdrop=0.5).train()
    expected = [model.generate(PROMPT, 4), model.generate(PROMPT.flip(1), 6)]
    streams = [model.generate_stream(PROMPT, 4), model.generate_stream(PROMPT.flip(1), 6)]
    tokens: list[list[torch.Tensor]] = [[], []]
    for turn in (0, 1, 0, 1, 1, 0, 0, 1, 1, 1):
        tokens[turn].append(next(streams[turn]))
        assert all(modes(model))
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    assert all(modes(model))
    for part, whole in zip(tokens, expected, strict=True):
        assert torch.equal(torch.stack(part, 1), whole[:, 5:])


@pytest.mark.parametrize("first", [True, False])
def test_a_stream_goes_on_across_inference_mode(any_model: MoLMForCausalLM, first: bool) -> None:
    expected = any_model.generate(PROMPT, 6)[:, 5:]
    stream = any_model.generate_stream(PROMPT, 6)
    tokens = []
    for step in range(6):
        with torch.inference_mode(first == (step < 3)):
            tokens.append(next(stream).clone())
    assert torch.equal(torch.stack(tokens, 1), expected)


def test_generation_goes_through_the_models_call(model: MoLMForCausalLM) -> None:
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_forward_hook(lambda _m, _x, output: calls.append(output.logits.shape))
    model.generate(PROMPT, 2)
    assert calls == ["before", (2, 1, 31), "before", (2, 1, 31)]


@pytest.mark.parametrize("in_config", [True, False])
def test_any_of_several_end_tokens_ends_a_sequence(model: MoLMForCausalLM, in_config: bool) -> None:
    free = model.generate(PROMPT, 8)[:, 5:].tolist()
    ends = (free[0][2], free[1][4])
    options: dict[str, Any] = {"pad_token_id": 30}
    if in_config:
        model.config = MoLMConfig.from_dict({**model.config.to_dict(), "eos_token_id": list(ends)})
        assert model.config.eos_token_id == ends
    else:
        options["eos_token_id"] = list(ends)
    rows = model.generate(PROMPT, 8, **options)[:, 5:].tolist()
    stops = [next(i for i, token in enumerate(row) if token in ends) for row in free]
    assert len(rows[0]) == max(stops) + 1
    for row, whole, stop in zip(rows, free, stops, strict=True):
        assert row == whole[: stop + 1] + [30] * (len(row) - stop - 1)
    del options["pad_token_id"]
    padding = model.generate(PROMPT, 8, **options)[:, 5:]
    shorter = stops.index(min(stops))
    assert (padding[shorter, stops[shorter] + 1 :] == ends[0]).all()


@pytest.mark.parametrize("temperature", [1e-10, 1e-30, 1e-40, 1e-300, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tiny_temperatures_are_greedy_and_huge_ones_uniform(temperature: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[-1e4, 3.0, 2.0, -torch.inf], [1e4, -3.0, 9e3, 0.0]], dtype=dtype)
    assert sample(logits, temperature=temperature, generator=torch.Generator().manual_seed(0)).tolist() == [1, 0]
    huge = [sample(logits, temperature=1e308, generator=torch.Generator().manual_seed(i)).tolist() for i in range(60)]
    assert [set(column) for column in zip(*huge, strict=True)] == [{0, 1, 2}, {0, 1, 2, 3}]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value: float, temperature: float) -> None:
    logits = torch.zeros(2, 4)
    logits[1, 2] = value
    with pytest.raises(FloatingPointError, match="sample: logits must be finite"):
        sample(logits, temperature=temperature)
    model = random_model()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        model.generate(PROMPT, 1, temperature=temperature)
