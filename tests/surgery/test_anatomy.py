"""Names and numbers of parameters against the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moduleformer_ext.models import PRESETS, MoLMConfig, MoLMForCausalLM
from moduleformer_ext.surgery import count_parameters, sites

VARIANTS: list[dict[str, Any]] = [
    {"gate_type": "mlp"},
    {"gate_type": "linear", "n_head": 2},
    {"gate_type": "gmm", "att_hidden": 32},
    {"tie_word_embeddings": True, "activation_function": "swiglu"},
    {"att_normaliser_rows": 2, "mlp_normaliser_rows": (0, 3)},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_parameter_counts_equal_the_formula(make_model, changes):
    model = make_model(**changes)
    assert count_parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_of_presets(name):
    with torch.device("meta"):
        model = MoLMForCausalLM(MoLMConfig.preset(name))
    assert count_parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("gate_type", ["mlp", "linear", "gmm"])
def test_names_are_those_of_the_state(make_model, gate_type):
    model = make_model(gate_type=gate_type)
    state = model.state_dict()
    for site in sites(model.config):
        parameters = [module.get_parameter(name) for module, name in site.expert_parameters(model)]
        for name, parameter in zip((*site.matrices, site.rows(model.config)), parameters, strict=True):
            assert state[name].data_ptr() == parameter.data_ptr()
            assert len(parameter) == site.num_experts(model.config)
