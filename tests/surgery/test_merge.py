"""Merging: each model's experts are there, with their own router rows, and nothing else has moved."""

from __future__ import annotations

import math

import pytest
import torch

from moduleformer_ext import ops
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import KINDS, PruningPlan, Site, compare, insert_experts, merge, prune, sites

GATES = ["mlp", "linear", "gmm"]


def _extensions(make_model, **changes) -> tuple[MoLMForCausalLM, MoLMForCausalLM, MoLMForCausalLM]:
    """A base, and two models that were extended from it apart."""
    base = make_model(**changes)
    return base, _extended(base, seed=1, attention=1, ffn=[2, 0]), _extended(base, seed=2, attention=[0, 2], ffn=1)


def _extended(model: MoLMForCausalLM, seed: int, **numbers) -> MoLMForCausalLM:
    """With new experts as large as the old ones."""
    extended, generator = insert_experts(model, **numbers), torch.Generator().manual_seed(seed)
    state = extended.state_dict()
    for site in sites(model.config):
        for name in (*site.matrices, site.rows(model.config)):
            state[name][site.num_experts(model.config) :].normal_(std=0.4, generator=generator)
    return extended


def _mask(model: MoLMForCausalLM, places: dict[Site, list[int]]) -> None:
    """Let routers see -inf for some experts."""
    for site, masked in places.items():
        gate = site.modules(model)[2]

        def route(x, forward=gate.forward, gate=gate, masked=masked):
            logits = forward(x).logits.clone()
            logits[:, masked] = -math.inf
            return ops.route_topk(logits, gate.k, order=gate.order)

        gate.forward = route


def _keep(model: MoLMForCausalLM, others: MoLMForCausalLM) -> dict[Site, tuple[int, ...]]:
    """The places of the experts that `others` has, bit for bit."""
    states = model.state_dict(), others.state_dict()

    def known(site: Site, place: int) -> bool:
        name = site.matrices[0]
        return any(torch.equal(states[0][name][place], expert) for expert in states[1][name])

    return {
        site: tuple(place for place in range(site.num_experts(model.config)) if known(site, place))
        for site in sites(model.config)
    }


@pytest.mark.parametrize("gate_type", GATES)
@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax"])
def test_without_the_other_s_rows_it_is_the_single_extension(make_model, tokens, gate_type, order):
    _, *singles = _extensions(make_model, gate_type=gate_type, router_order=order)
    for single in singles:
        merged = merge(*singles)
        assert not torch.allclose(merged(tokens).logits, single(tokens).logits)
        kept = _keep(merged, single)
        _mask(merged, {s: sorted(set(range(s.num_experts(merged.config))) - set(kept[s])) for s in kept})
        torch.testing.assert_close(merged(tokens).logits, single(tokens).logits, rtol=0, atol=1e-12)


def test_every_expert_and_row_has_its_bits(make_model):
    base, one, two = _extensions(make_model)
    merged = merge(one, two)
    assert [merged.config.num_experts(kind) for kind in KINDS] == [(5, 7), (8, 7)]
    assert (merged.config.attention.num_new, merged.config.ffn.num_new) == ((1, 3), (3, 1))
    states = [model.state_dict() for model in (base, one, two, merged)]
    for site in sites(base.config):
        num_old = site.num_experts(base.config)
        for name in (*site.matrices, site.rows(base.config)):
            parts = [states[0][name], *(state[name][num_old:] for state in states[1:3])]
            assert torch.equal(states[3][name], torch.cat(parts)), name
    assert Site("attention", 1).identities(merged.config) == [0, 1, 2, 3, 4, 6, 5]  # both inserted a 4
    assert Site("ffn", 0).identities(merged.config) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert not any(compare(base, merged).others.values())


def test_pruning_the_other_s_experts_gives_the_single_extension(make_model, tokens):
    _, one, two = _extensions(make_model, router_order="topk_softmax")
    merged = merge(one, two)
    for single in (one, two):
        pruned = prune(merged, PruningPlan(merged.config, _keep(merged, single)))
        assert torch.equal(pruned(tokens).logits, single(tokens).logits)


def test_a_model_merged_with_itself_or_its_base_is_itself(make_model, tokens):
    base, one, _ = _extensions(make_model)
    for other in (one, base):
        merged = merge(one, other)
        assert torch.equal(merged(tokens).logits, one(tokens).logits)
        assert merged.config == one.config


def test_what_is_old_in_one_model_and_new_in_the_other_is_there_once(make_model):
    _, one, two = _extensions(make_model)
    further = _extended(one, seed=7, attention=1)
    merged = merge(further, one)
    assert merged.config == further.config
    merged = merge(one, further)
    assert merged.config == further.config
    with pytest.raises(
        ValueError, match="expert 5 of layer 0 ffn must be the same in both models, or new in both, got two"
    ):
        merge(further, two)


def test_experts_that_one_model_pruned_come_from_the_other(make_model, tokens):
    base, one, two = _extensions(make_model)
    everything = {site: tuple(range(site.num_experts(one.config))) for site in sites(one.config)}
    pruned = prune(one, PruningPlan(one.config, {**everything, Site("ffn", 1): (1, 2, 3, 5)}))
    merged = merge(pruned, two)
    assert Site("ffn", 1).identities(merged.config) == [1, 2, 3, 5, 0, 4, 6]
    assert set(compare(base, merged).experts[Site("ffn", 1)].matrices) == set(range(6))
    assert merged(tokens).logits.isfinite().all()


def test_merged_model_saves_loads_extends_and_merges_again(make_model, tokens, tmp_path):
    base, one, two = _extensions(make_model)
    merged = merge(one, two)
    merged.save_pretrained(tmp_path)
    loaded = MoLMForCausalLM.from_pretrained(tmp_path)
    assert loaded.config == merged.config and torch.equal(loaded(tokens).logits, merged(tokens).logits)
    three = _extended(base, seed=3, ffn=1)
    again = merge(loaded, three)
    assert Site("ffn", 0).identities(again.config) == [*range(9)]
    assert Site("ffn", 0).identities(insert_experts(again, ffn=1).config) == [*range(10)]


def test_the_given_models_are_left_alone(make_model):
    _, one, two = _extensions(make_model)
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (one, two)]
    for parameter in merge(one, two).parameters():
        parameter.data.zero_()
    for model, state in zip((one, two), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_conflicts_are_refused(make_model):
    base, one, two = _extensions(make_model)
    with pytest.raises(ValueError, match="merge: models must agree but for their experts, got ffd_hidden 12 and 16"):
        merge(one, make_model(ffd_hidden=16))
    with pytest.raises(ValueError, match="merge: models must agree but for their experts, got k_mlp 3 and 2"):
        merge(one, make_model(k_mlp=2))
    with pytest.raises(ValueError, match=r"got different lm_head\.weight, transformer\..*; train new experts alone"):
        merge(one, make_model(seed=1))
    with pytest.raises(ValueError, match=r"got different lm_head\.weight"):
        merge(one, make_model(torch.float32))
    with torch.no_grad():
        two.get_parameter(Site("ffn", 1).rows(base.config))[2] += 1
    with pytest.raises(ValueError, match="expert 2 of layer 1 ffn must be the same in both models, or new in both"):
        merge(one, two)
    everything = {site: tuple(range(site.num_experts(base.config))) for site in sites(base.config)}
    plan = PruningPlan(base.config, {**everything, Site("ffn", 0): (0, 1, 2)}, keep_normaliser=True)
    with pytest.raises(ValueError, match=r"got different .*normaliser_rows"):
        merge(prune(base, plan), one)
