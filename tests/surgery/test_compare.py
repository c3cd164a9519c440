"""Experts are followed by identity."""

from __future__ import annotations

import json

import pytest
import torch

from moduleformer_ext.surgery import PruningPlan, Site, compare, insert_experts, prune, sites


def test_a_model_equals_itself(make_model):
    model = make_model()
    found = compare(model, model)
    for comparison in found.experts.values():
        assert not any(comparison.matrices.values()) and not any(comparison.rows.values())
        assert not comparison.only_first and not comparison.only_second
    assert not any(found.others.values())
    assert "same, 0 changed" in found.summary()


def test_changes_are_found_after_pruning_and_insertion(make_model):
    model = make_model()
    site = Site("ffn", 1)
    kept = {s: tuple(range(s.num_experts(model.config))) for s in sites(model.config)}
    other = insert_experts(prune(model, PruningPlan(model.config, {**kept, site: (1, 2, 4, 5)})), ffn=[0, 2])
    with torch.no_grad():
        up = other.get_parameter(site.matrices[0])
        up[1] *= 3  # identity 2
        other.transformer.ln_f.bias += 1
    found = compare(model, other)
    comparison = found.experts[site]
    assert list(comparison.only_first) == [0, 3]
    assert list(comparison.only_second) == [6, 7]
    old = torch.cat([model.get_parameter(name)[2].flatten() for name in site.matrices])
    expected = 2 * model.get_parameter(site.matrices[0])[2].norm() / old.norm()
    assert comparison.matrices == pytest.approx({1: 0, 2: expected.item(), 4: 0, 5: 0})
    assert [name for name, change in found.others.items() if change] == ["transformer.ln_f.bias"]
    assert json.loads(json.dumps(found.to_dict()))["experts"][3]["only_second"] == [6, 7]
    assert "only in the first: 0, 3; only in the second: 6, 7" in found.summary()


def test_models_of_other_shape_are_refused(make_model):
    with pytest.raises(ValueError, match=r"compare: models must agree but for their experts, got ffd_hidden 12 and 16"):
        compare(make_model(), make_model(ffd_hidden=16))
