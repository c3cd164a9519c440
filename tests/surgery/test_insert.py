"""Insertion, freezing and the routing regularisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moduleformer_ext import ops
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.surgery import (
    KINDS,
    PENALTIES,
    ExpertUsage,
    PruningPlan,
    Site,
    insert_experts,
    prune,
    routing_penalty,
    set_trainable,
    sites,
)

GATES = ["mlp", "linear", "gmm"]


def _mask_new_logits(model: MoLMForCausalLM) -> None:
    """Let every router see -inf for its new experts."""
    for site in sites(model.config):
        gate, num_new = site.modules(model)[2], site.num_new(model.config)

        def masked(x, route=gate.forward, gate=gate, num_new=num_new):
            logits = route(x).logits.clone()
            logits[:, gate.num_experts - num_new :] = -math.inf
            return ops.route_topk(logits, gate.k, order=gate.order)

        gate.forward = masked


@pytest.mark.parametrize("gate_type", GATES)
@pytest.mark.parametrize("init", ["random", "copy"])
@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax"])
def test_masked_new_experts_leave_the_logits(make_model, tokens, gate_type, init, order):
    model = make_model(gate_type=gate_type, router_order=order)
    extended = insert_experts(model, attention=2, ffn=[1, 3], init=init)
    assert [extended.config.num_experts(kind) for kind in KINDS] == [(6, 6), (6, 9)]
    assert not torch.equal(extended(tokens).logits, model(tokens).logits)
    _mask_new_logits(extended)
    torch.testing.assert_close(extended(tokens).logits, model(tokens).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate_type", GATES)
def test_routing_is_the_softmax_over_both_matrices(make_model, gate_type):
    """Equation 9 in float64: p = softmax([A; A'] h(x))."""
    extended = insert_experts(make_model(gate_type=gate_type), ffn=2)
    gate = extended.transformer.h[0].mlpf.gate
    x = torch.randn(30, 16, dtype=torch.float64)
    module, name = gate.rows_parameter
    rows = module.get_parameter(name)
    old, new = rows[:-2], rows[-2:]
    if gate_type == "linear":
        hidden = x
    elif gate_type == "mlp":
        hidden = torch.nn.functional.gelu(x @ gate.w_gate[0].weight.T + gate.w_gate[0].bias)
    else:
        hidden = torch.nn.functional.normalize(gate.w_gate(x), dim=-1) * gate.temperature.exp()
        old, new = (torch.nn.functional.normalize(part, dim=-1) for part in (old, new))
    scores = torch.cat([hidden @ old.T, hidden @ new.T], dim=1).exp()
    gates, ids = (scores / scores.sum(1, keepdim=True)).topk(3)
    route = gate(x)
    torch.testing.assert_close(route.gates, gates, rtol=1e-10, atol=1e-12)
    assert torch.equal(route.expert_ids.long(), ids)


def test_copies_are_of_the_most_used(make_model):
    model = make_model()
    usage = ExpertUsage({"attention": [np.array([0, 5, 1, 9])] * 2, "ffn": [np.array([0] * 5), np.array([0] * 6)]})
    extended = insert_experts(model, attention=6, init="copy", usage=usage)
    site = Site("attention", 0)
    up = extended.state_dict()[site.matrices[0]]
    assert torch.equal(up[4:], up[[3, 1, 2, 0, 3, 1]])
    rows = extended.state_dict()[site.rows(model.config)]
    assert not torch.equal(rows[4], rows[3])
    torch.testing.assert_close(rows[4], rows[3], rtol=0, atol=0.5 * rows[3].norm().item())


def test_insertion_is_seeded(make_model):
    model = make_model()
    one, same, other = (insert_experts(model, ffn=2, seed=seed).state_dict() for seed in (1, 1, 2))
    name = Site("ffn", 0).matrices[0]
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    assert one[name][5:].abs().max() <= 1 / 16


@pytest.mark.parametrize("gate_type", GATES)
@pytest.mark.parametrize("embedding", [False, True])
def test_frozen_parameters_keep_their_bits_and_have_no_state(make_model, tokens, gate_type, embedding):
    model = insert_experts(make_model(torch.float32, gate_type=gate_type), attention=1, ffn=[0, 2]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_trainable(model, "new", embedding=embedding)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.5)
    for _ in range(3):
        output = model(tokens, labels=tokens, output_routes=True)
        (output.loss + 0.1 * routing_penalty(model, output.routes)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    assert set(optimizer.state) == set(trained)

    after = model.state_dict()
    assert after.keys() == before.keys()
    changing = {"transformer.wte.weight"} if embedding else set()
    for site in sites(model.config):
        num_new = site.num_new(model.config)
        for name in (*site.matrices, site.rows(model.config)):
            changing.add(name)
            old = len(before[name]) - num_new
            assert torch.equal(after[name][:old], before[name][:old]), name
            assert num_new == 0 or not torch.equal(after[name][old:], before[name][old:]), name
    for name in before.keys() - changing:
        assert torch.equal(after[name], before[name]), name
    assert embedding != torch.equal(after["transformer.wte.weight"], before["transformer.wte.weight"])


def test_a_split_model_computes_and_saves_as_a_whole_one(make_model, tokens, tmp_path):
    model = insert_experts(make_model(torch.float32), attention=2, ffn=1)
    expected = model(tokens).logits
    set_trainable(model, "new")
    assert torch.equal(model(tokens).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = MoLMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, expected)
    model.load_state_dict({name: tensor + 1 for name, tensor in loaded.state_dict().items()})
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor + 1) for name, tensor in loaded.state_dict().items())
    set_trainable(model, "all")
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in loaded.named_parameters()}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_all_experts(make_model):
    model = make_model()
    set_trainable(model, "experts")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {n for site in sites(model.config) for n in (*site.matrices, site.rows(model.config))}


def test_prune_insert_save_load_compose(make_model, tokens, tmp_path):
    model = make_model()
    everything = {site: tuple(range(site.num_experts(model.config))) for site in sites(model.config)}
    site = Site("ffn", 0)
    pruned = prune(model, PruningPlan(model.config, {**everything, site: (0, 2, 3)}, keep_normaliser=True))
    extended = insert_experts(pruned, ffn=2)
    assert site.identities(extended.config) == [0, 2, 3, 5, 6]
    extended.save_pretrained(tmp_path)
    loaded = MoLMForCausalLM.from_pretrained(tmp_path)
    assert loaded.config == extended.config
    assert torch.equal(loaded(tokens).logits, extended(tokens).logits)

    again = insert_experts(loaded, attention=1, ffn=1, seed=3)
    assert site.identities(again.config) == [0, 2, 3, 5, 6, 7]
    assert site.num_new(again.config) == 1
    rest = {s: tuple(range(s.num_experts(again.config))) for s in sites(again.config)}
    last = prune(again, PruningPlan(again.config, {**rest, site: (1, 3, 5)}))
    assert site.identities(last.config) == [2, 5, 7]
    assert site.num_new(last.config) == 1
    assert site.places(last.config) == (-1, -1, 0, -1, -1, 1, -1, 2)
    for name in site.matrices:
        assert torch.equal(last.state_dict()[name][0], model.state_dict()[name][2])
        assert torch.equal(last.state_dict()[name][1], loaded.state_dict()[name][3])

    # what was inserted goes again: the model from before, but for its memory of what there was
    undone = prune(
        extended,
        PruningPlan(extended.config, {s: tuple(range(s.num_experts(pruned.config))) for s in sites(model.config)}),
    )
    assert torch.equal(undone(tokens).logits, pruned(tokens).logits)


@pytest.mark.parametrize("gate_type", GATES)
@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("split", [False, True])
def test_penalty_is_the_formula(make_model, tokens, gate_type, kind, split):
    model = insert_experts(make_model(gate_type=gate_type), attention=1, ffn=[2, 0])
    if split:
        set_trainable(model, "new")
    output = model(tokens, output_routes=True)
    expected = 0.0
    for site in sites(model.config):
        num_new = site.num_new(model.config)
        if kind == "norm":
            rows = model.state_dict()[site.rows(model.config)]
            expected += sum(value**2 for row in rows.tolist()[len(rows) - num_new :] for value in row)
        elif num_new:
            logits = getattr(output.routes[site.layer], site.kind).logits
            expected += logits.softmax(-1)[:, -num_new:].sum(1).mean().item()
    penalty = routing_penalty(model, output.routes, kind)
    assert penalty.item() == pytest.approx(expected, rel=1e-6)
    penalty.backward()
    new = [p for name, p in model.named_parameters() if p.requires_grad and "gate" in name]
    assert any(p.grad is not None and p.grad.norm() > 0 for p in new)


def test_refusals(make_model):
    model = make_model()
    for arguments, message in [
        ({}, "attention or ffn must be above 0"),
        ({"ffn": -1}, r"ffn must be one number or one per layer \(2\), at least 0, got -1"),
        ({"attention": [1, 1, 1]}, r"attention must be one number or one per layer \(2\)"),
        ({"ffn": 1, "init": "zero"}, "init must be one of random, copy, got 'zero'"),
        ({"ffn": 1, "usage": ExpertUsage()}, "usage must be None with init 'random'"),
        ({"ffn": 1, "init": "copy", "usage": ExpertUsage()}, "attention counts must be of 2 layers, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            insert_experts(model, **arguments)
    with pytest.raises(ValueError, match="part must not be 'new' for a model without new experts"):
        set_trainable(model, "new")
    with pytest.raises(ValueError, match="part must be one of all, experts, new, got 'router'"):
        set_trainable(model, "router")
    with pytest.raises(ValueError, match="model must have new experts"):
        routing_penalty(model, [], "norm")
    with pytest.raises(ValueError, match="kind must be one of norm, share, got 'l1'"):
        routing_penalty(insert_experts(model, ffn=1), [], "l1")
