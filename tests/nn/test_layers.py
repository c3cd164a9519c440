"""Mixtures of experts, attention and blocks as modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moduleformer_ext.nn import Block, LinearRouter, MixtureOfAttention, MixtureOfFFN

D = 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_one_expert_is_a_plain_feed_forward_layer(activation: str) -> None:
    layer = MixtureOfFFN(D, 24, LinearRouter(D, 1, 1), activation=activation).double()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    y, route = layer(x)
    h = x @ layer.experts.weight[0]
    if activation == "swiglu":
        assert layer.experts.weight.shape == (1, D, 48)
        h = F.silu(h[..., :24]) * h[..., 24:]
    else:
        h = F.gelu(h, approximate="tanh")
    torch.testing.assert_close(y, h @ layer.output_experts.weight[0])
    assert route.counts.tolist() == [6]


def test_one_attention_expert_is_plain_stick_breaking() -> None:
    layer = MixtureOfAttention(D, D, 1, LinearRouter(D, 1, 1)).double()
    assert layer.identity_kv
    x = torch.randn(1, 5, D, dtype=torch.float64)
    y, _, present = layer(x)
    assert present is None
    scores = (x[0] @ layer.q_proj.experts.weight[0]) @ x[0].T / D**0.5
    weights = torch.zeros_like(scores)
    for i in range(5):
        for j in range(i + 1):
            weights[i, j] = scores[i, j].sigmoid() * torch.sigmoid(-scores[i, j + 1 : i + 1]).prod()
    torch.testing.assert_close(y[0], weights @ x[0] @ layer.q_proj.output_experts.weight[0])


def test_block_is_residual() -> None:
    attention = MixtureOfAttention(D, 32, 4, LinearRouter(D, 4, 2))
    ffn = MixtureOfFFN(D, 8, LinearRouter(D, 4, 2))
    block = Block(D, attention, ffn)
    with torch.no_grad():
        attention.q_proj.output_experts.weight.zero_()
        ffn.output_experts.weight.zero_()
    x = torch.randn(2, 3, D)
    y, routes, present = block(x, use_cache=True)
    assert torch.equal(x, y) and routes.attention.gates.shape == (6, 2)
    assert present.length == 3 and present.keys.shape == (2, 3, 4, 8)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"att_hidden must be a multiple of n_head \(3\), got 16"):
        MixtureOfAttention(D, 16, 3, LinearRouter(D, 4, 2))
