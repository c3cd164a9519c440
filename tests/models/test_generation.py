"""Decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import random_model

from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.models.generation import sample

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
        ({"temperature": -1.0}, "temperature must be >= 0"),
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
