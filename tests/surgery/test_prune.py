"""Pruning: what stays computes what it did."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moduleformer_ext import ops, reference
from moduleformer_ext.surgery import (
    KINDS,
    ExpertUsage,
    PruningPlan,
    Site,
    count_parameters,
    count_usage,
    insert_experts,
    plan_by_size,
    plan_by_threshold,
    prune,
    sites,
)


def _usage(model, seed: int = 0) -> ExpertUsage:
    generator = np.random.default_rng(seed)
    counts = {"attention": [], "ffn": []}
    for site in sites(model.config):
        counts[site.kind].append(generator.integers(1, 100, site.num_experts(model.config)))
    return ExpertUsage(counts)


def _keep(model, **dropped) -> dict[Site, tuple[int, ...]]:
    """Keep all but the given places of every layer."""
    return {
        site: tuple(place for place in range(site.num_experts(model.config)) if place not in dropped.get(site.kind, ()))
        for site in sites(model.config)
    }


def _shun(model, kind: str, places: list[int]) -> None:
    """Make a router avoid experts: their logits become very low for every input with a constant feature."""
    with torch.no_grad():
        for site in sites(model.config):
            if site.kind == kind:
                gate = site.modules(model)[2]
                gate.w_gate[0].bias[0] = 30.0  # gelu(30) = 30: the first hidden feature is large for every token
                gate.w_gate[0].weight[0] = 0.0
                gate.w_gate[3].weight[:, 0] = 0.0
                gate.w_gate[3].weight[places, 0] = -0.3  # about -9: never chosen, yet in the softmax


@pytest.mark.parametrize(
    ("order", "keep_normaliser"), [("topk_softmax", False), ("softmax_topk", True)], ids=["after", "before"]
)
def test_pruning_experts_that_are_never_chosen_leaves_logits(make_model, tokens, order, keep_normaliser):
    model = make_model(router_order=order)
    _shun(model, "attention", [1, 3])
    _shun(model, "ffn", [0, 2])
    usage = count_usage(model, [tokens])
    assert all(usage.counts["attention"][layer][[1, 3]].sum() == 0 for layer in range(2))
    plan = PruningPlan(model.config, _keep(model, attention=[1, 3], ffn=[0, 2]), keep_normaliser)
    pruned = prune(model, plan)
    torch.testing.assert_close(pruned(tokens).logits, model(tokens).logits, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in pruned.parameters()) == count_parameters(plan.pruned_config)


def test_without_the_normaliser_kept_gates_grow_by_the_pruned_share(make_model, tokens):
    model = make_model()
    _shun(model, "ffn", [0, 2])
    pruned = prune(model, PruningPlan(model.config, _keep(model, ffn=[0, 2])))
    x = torch.randn(20, 16, dtype=torch.float64)
    for layer in range(2):
        before, after = (m.transformer.h[layer].mlpf.gate(x) for m in (model, pruned))
        share = before.logits.softmax(-1)[:, [0, 2]].sum(-1, keepdim=True)
        assert share.min() > 0
        torch.testing.assert_close(after.gates, before.gates / (1 - share), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gate_type", ["mlp", "linear", "gmm"])
def test_kept_normaliser_rows_give_the_gates_of_the_whole_softmax(make_model, gate_type):
    """For tokens that would choose pruned experts too: the gates of the kept ones are what they were."""
    model = make_model(gate_type=gate_type, k_mlp=1)
    pruned = prune(model, PruningPlan(model.config, _keep(model, ffn=[1, 4]), keep_normaliser=True))
    x = torch.randn(40, 16, dtype=torch.float64)
    whole = model.transformer.h[0].mlpf.gate(x).logits.softmax(-1)
    route = pruned.transformer.h[0].mlpf.gate(x)
    expected, ids = whole[:, [0, 2, 3]].max(-1)
    assert torch.equal(route.expert_ids[:, 0].long(), ids)
    torch.testing.assert_close(route.gates[:, 0], expected, rtol=1e-12, atol=0)
    assert route.counts.tolist() == ids.bincount(minlength=3).tolist()


def test_kept_normaliser_has_the_gradient_of_the_whole_softmax(make_model):
    model = make_model(k_mlp=1)
    pruned = prune(model, PruningPlan(model.config, _keep(model, ffn=[1, 4]), keep_normaliser=True))
    gate, whole = pruned.transformer.h[0].mlpf.gate, model.transformer.h[0].mlpf.gate
    x = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(whole(x).logits.softmax(-1)[:, [0, 2, 3]].max(-1)[0].square().sum(), x)
    loss = gate(x).gates.square().sum()
    (measured,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(measured, expected, rtol=1e-9, atol=1e-12)
    assert torch.autograd.grad(loss, gate.normaliser_rows)[0].norm() > 0


def test_pruning_twice_keeps_all_rows_in_the_softmax(make_model, tokens):
    model = make_model()
    step = prune(model, PruningPlan(model.config, _keep(model, ffn=[1]), keep_normaliser=True))
    twice = prune(step, PruningPlan(step.config, _keep(step, ffn=[2]), keep_normaliser=True))  # identity 3
    once = prune(model, PruningPlan(model.config, _keep(model, ffn=[1, 3]), keep_normaliser=True))
    assert twice.config == once.config
    torch.testing.assert_close(twice(tokens).logits, once(tokens).logits, rtol=1e-12, atol=1e-12)


def test_experts_keep_their_identities(make_model):
    model = make_model()
    pruned = prune(model, PruningPlan(model.config, _keep(model, attention=[0, 2], ffn=[1])))
    site = Site("attention", 0)
    assert site.identities(pruned.config) == [1, 3]
    assert site.places(pruned.config) == (-1, 0, -1, 1)
    for name in (*site.matrices, site.rows(model.config)):
        assert torch.equal(pruned.state_dict()[name], model.state_dict()[name][[1, 3]])


def test_threshold(make_model):
    model = make_model()
    usage = ExpertUsage({"attention": [np.array([10, 0, 5, 1])] * 2, "ffn": [np.array([9, 8, 0, 7, 6])] * 2})
    usage.counts["ffn"][1] = np.array([9, 0, 0, 0, 0, 1])
    plan = plan_by_threshold(model.config, usage, 0.6, normalise="max")
    assert plan.kept[Site("attention", 0)] == (0, 2)  # k, though the second is below
    assert plan.kept[Site("ffn", 0)] == (0, 1, 3, 4)
    assert plan.kept[Site("ffn", 1)] == (0, 1, 5)  # the lower place stays among equals
    by_sum = plan_by_threshold(model.config, usage, 0.28, normalise="sum")
    assert by_sum.kept[Site("ffn", 0)] == (0, 1, 3)
    assert plan_by_threshold(model.config, usage, 0.0).remaining == 1


@pytest.mark.parametrize("normalise", ["max", "sum"])
@pytest.mark.parametrize("keep_normaliser", [False, True])
def test_size(make_model, normalise, keep_normaliser):
    model = make_model()
    usage = _usage(model)
    largest = 2 * 16 * 16 + 8  # an attention expert and its router row
    size = count_parameters(model.config)
    previous = None
    for remaining in (0.9, 0.75, 0.65):
        options = {"normalise": normalise, "keep_normaliser": keep_normaliser}
        plan = plan_by_size(model.config, usage, remaining, **options)
        pruned = prune(model, plan)
        left = sum(p.numel() for p in pruned.parameters()) / size
        assert left == pytest.approx(plan.remaining)
        assert remaining - largest / size < left <= remaining
        for site in sites(model.config):
            frequencies = usage.counts[site.kind][site.layer]
            if plan.dropped(site):
                assert max(frequencies[plan.dropped(site)]) <= min(frequencies[list(plan.kept[site])])
            assert previous is None or set(plan.kept[site]) <= set(previous.kept[site])
        previous = plan


def test_pruned_model_saves_generates_and_trains(make_model, tokens, tmp_path):
    model = make_model(dtype=torch.float32)
    pruned = prune(model, plan_by_size(model.config, _usage(model), 0.7, keep_normaliser=True))
    pruned.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config == pruned.config
    assert torch.equal(loaded(tokens).logits, pruned(tokens).logits)
    assert loaded.generate(tokens, max_new_tokens=3).shape == (3, 13)
    loaded.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loaded.parameters())
    with pytest.raises(ValueError, match="normaliser_rows must be 0 in the published format"):
        loaded.to_reference()


@pytest.mark.parametrize("gate_type", ["mlp", "linear", "gmm"])
def test_kernels_take_other_numbers_of_experts_in_every_layer(make_model, tokens, gate_type, monkeypatch):
    """A pruned and extended model, as many experts as are chosen in one layer, more than before in another: logits and
    all gradients are those of the plain-PyTorch twins.
    """
    model = make_model(gate_type=gate_type)
    kept = {**_keep(model), Site("ffn", 0): (1, 2, 4), Site("attention", 1): (0, 3), Site("ffn", 1): (0, 1, 2, 5)}
    uneven = insert_experts(prune(model, PruningPlan(model.config, kept)), attention=[3, 0], ffn=[0, 5], init="copy")
    assert [uneven.config.num_experts(kind) for kind in KINDS] == [(7, 2), (3, 9)]

    def run():
        uneven.zero_grad()
        output = uneven(tokens, labels=tokens)
        (output.loss + 0.1 * output.aux_loss).backward()
        return output.logits, {name: parameter.grad.clone() for name, parameter in uneven.named_parameters()}

    logits, gradients = run()
    for name in (f"route_topk_{gate_type}", "expert_layout", "grouped_gemm", "expert_ffn"):
        monkeypatch.setattr(ops, name, getattr(reference, name))
    expected_logits, expected = run()
    torch.testing.assert_close(logits, expected_logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def test_the_given_model_is_left_alone(make_model):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune(model, plan_by_size(model.config, _usage(model), 0.7))
    for parameter in pruned.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_refusals(make_model):
    model, other = make_model(), make_model(n_att_experts=5)
    usage = _usage(model)
    with pytest.raises(ValueError, match="layer 0 ffn must keep at least 3 experts, which a token is routed to, got 2"):
        PruningPlan(model.config, _keep(model, ffn=[0, 1, 2]))
    with pytest.raises(ValueError, match=r"layer 0 attention must ascend within 0 to 3, got \[0, 1, 7\]"):
        PruningPlan(model.config, {**_keep(model), Site("attention", 0): (0, 1, 7)})
    with pytest.raises(ValueError, match="must name every layer's"):
        PruningPlan(model.config, {**_keep(model), Site("ffn", 9): (0, 1, 2)})
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.5"):
        plan_by_threshold(model.config, usage, 1.5)
    with pytest.raises(
        ValueError, match=r"remaining must be in \[0\.\d+, 1\], as every layer keeps k experts, got 0.1"
    ):
        plan_by_size(model.config, usage, 0.1)
    with pytest.raises(ValueError, match="counts of layer 0 attention must be of 5 experts, got 4"):
        plan_by_size(other.config, usage, 0.8)
    with pytest.raises(ValueError, match="plan must be made for this model"):
        prune(other, plan_by_size(model.config, usage, 0.8))
    after = make_model(router_order="topk_softmax")
    with pytest.raises(ValueError, match="keep_normaliser must be False for router_order 'topk_softmax'"):
        plan_by_size(after.config, usage, 0.8, keep_normaliser=True)
