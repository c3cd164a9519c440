import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moduleformer_ext.data import TokenStream
from moduleformer_ext.models import MoLMConfig, MoLMForCausalLM
from moduleformer_ext.surgery.anatomy import KINDS
from moduleformer_ext.train import Score, evaluate, overall_bits_per_byte
from moduleformer_ext.train.evaluation import _split_lanes

TOKENS = np.random.default_rng(0).integers(0, 40, 103).astype(np.uint16)


@pytest.fixture(scope="module")
def model() -> MoLMForCausalLM:
    torch.manual_seed(0)
    config = MoLMConfig.preset("molm-nano", vocab_size=40, n_embd=16, att_hidden=16, history_length=1000)
    return MoLMForCausalLM(config)


@pytest.mark.parametrize(("batch_size", "segment_length"), [(1, 7), (4, 10), (8, 512), (200, 1)])
def test_lanes_score_every_token_once(batch_size: int, segment_length: int) -> None:
    pieces = [row for lanes in _split_lanes(TOKENS, batch_size, segment_length) for row in lanes.tolist()]
    assert [token for piece in pieces for token in piece[1:]] == TOKENS[1:].tolist()
    assert [token for piece in pieces for token in piece[:-1]] == TOKENS[:-1].tolist()


def test_one_lane_scores_as_one_long_pass(model: MoLMForCausalLM) -> None:
    score = evaluate(model, {"d": TokenStream(TOKENS, 300, 1)}, batch_size=1, segment_length=9)["d"]
    ids = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.no_grad():
        output = model.eval()(ids[None, :-1], output_routes=True)
    bits = F.cross_entropy(output.logits[0], ids[1:], reduction="sum").item() / math.log(2)
    assert score.bits == pytest.approx(bits, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(bits / 300, rel=1e-5)
    assert score.perplexity == pytest.approx(2 ** (bits / 102), rel=1e-5)


def test_usage_counts_equal_brute_force(model: MoLMForCausalLM) -> None:
    usage = evaluate(model, {"d": TokenStream(TOKENS, 300, 1)}, batch_size=1, segment_length=9)["d"].usage
    with torch.no_grad():
        output = model.eval()(torch.from_numpy(TOKENS[None, :-1].astype(np.int64)), output_routes=True)
    for layer, routes in enumerate(output.routes):
        for kind, k in zip(KINDS, (model.config.attention.k, model.config.ffn.k), strict=True):
            counts = usage.counts[kind][layer]
            chosen = getattr(routes, kind).expert_ids.flatten().tolist()
            assert counts.tolist() == [chosen.count(expert) for expert in range(len(counts))]
            assert counts.sum() == k * (len(TOKENS) - 1)
            assert usage.frequencies(kind)[layer].sum() == pytest.approx(1.0)


def test_domains_add_up(model: MoLMForCausalLM) -> None:
    model.train()
    scores = evaluate(model, {"a": TokenStream(TOKENS[:50], 10, 1), "b": TokenStream(TOKENS, 30, 1)}, segment_length=20)
    assert model.training
    total = scores["a"].bits_per_byte * 10 + scores["b"].bits_per_byte * 30
    assert overall_bits_per_byte(scores) == pytest.approx(total / 40)


def test_a_loss_beyond_floats_is_an_infinite_perplexity() -> None:
    assert Score(bits=1e6, num_tokens=10, num_bytes=10).perplexity == math.inf
    assert Score(bits=10.0, num_tokens=10, num_bytes=10).perplexity == 2.0


def test_a_loss_that_is_no_number_is_an_error(model: MoLMForCausalLM) -> None:
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="the loss on domain 'd' must be a number, got nan"):
        evaluate(model, {"d": TokenStream(TOKENS, 300, 1)})


@pytest.mark.parametrize("name", ["batch_size", "segment_length"])
@pytest.mark.parametrize("value", [0, -5])
def test_sizes_below_one_are_errors(model: MoLMForCausalLM, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"evaluate: {name} must be at least 1, got {value}"):
        evaluate(model, {"d": TokenStream(TOKENS, 300, 1)}, **{name: value})


def test_every_module_gets_its_own_mode_back(model: MoLMForCausalLM) -> None:
    model.train().transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, {"d": TokenStream(TOKENS, 300, 1)}, batch_size=1, segment_length=9)
    assert [module.training for module in model.modules()] == before
    model.eval()
