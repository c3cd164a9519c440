"""The configuration: validation, presets, formats."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from moduleformer_ext.models import PRESETS, ExpertsConfig, MoLMConfig, MoLMForCausalLM
from moduleformer_ext.models.experts import PUBLISHED_NAMES


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("molm-4b-k2", 4.14e9), ("molm-4b-k4", 4.14e9), ("molm-8b-k2", 8.18e9), ("molm-tiny", 11.7e6)],
)
def test_presets_have_the_published_size(name: str, parameters: float) -> None:
    with torch.device("meta"):
        model = MoLMForCausalLM(MoLMConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=5e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    config = MoLMConfig.preset(name, n_mlp_experts=[8] * int(PRESETS[name]["n_layer"]), stick_epsilon=0.0)
    assert MoLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": 0}, "n_embd must be a positive integer, got 0"),
        ({"n_layer": 2.0}, "n_layer must be a positive integer, got 2.0"),
        ({"att_hidden": 12, "n_head": 5}, r"att_hidden must be a multiple of n_head \(5\), got 12"),
        ({"k_att": 33}, r"k_att must be at most n_att_experts \(32\), got 33"),
        ({"n_mlp_experts": [4, 4]}, r"n_mlp_experts must be one number or one per layer \(24\)"),
        ({"n_layer": 2, "n_mlp_experts": [4, 1]}, r"k_mlp must be at most n_mlp_experts \(1\)"),
        ({"gate_type": "top1"}, "gate_type must be one of mlp, linear, gmm, got 'top1'"),
        ({"activation_function": "tanh"}, "activation_function must be one of"),
        ({"aux_loss_type": "z"}, "aux_loss_type must be one of"),
        ({"sample_topk": 3}, r"sample_topk must be in \[0, 2\]"),
        ({"resid_pdrop": 1.0}, r"resid_pdrop must be in \[0, 1\)"),
        ({"aux_loss_weight": float("nan")}, "aux_loss_weight must be finite"),
        ({"history_length": -1}, "history_length must be a non-negative integer"),
    ],
)
def test_bad_fields_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoLMConfig.from_dict(changes)


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown fields depth"):
        MoLMConfig.from_dict({"depth": 3})
    with pytest.raises(ValueError, match="preset must be one of molm-4b-k2"):
        MoLMConfig.preset("molm")


def test_published_format() -> None:
    published = {
        "architectures": ["ModuleFormerForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "n_head": 1,
        "att_hidden": 64,
        "gate_type": "gmm",
        "layer_norm_epsilon": 0.1,
        "attn_pdrop": 0.0,
        "torch_dtype": "bfloat16",
        "n_ctx": 1536,
    }
    config = MoLMConfig.from_reference(published)
    assert (config.n_embd, config.n_layer, config.gate_type, config.attention.num_experts) == (64, 3, "gmm", 32)
    assert config.layer_norm_epsilon == 1e-5  # the field has no effect in the published implementation
    assert config.eos_token_id == 50256
    assert MoLMConfig.from_reference(config.to_reference()) == config


def test_our_own_files() -> None:
    """They say which model they are of, and that every field means what it means here."""
    config = MoLMConfig(router_order="topk_softmax", layer_norm_epsilon=1e-3, n_layer=2, eos_token_id=(1, 2))
    fields = json.loads(json.dumps(config.to_file()))
    assert fields["model_type"] == "moduleformer" and MoLMConfig.from_reference(fields) == config
    del fields["format"]
    assert MoLMConfig.from_reference(fields).layer_norm_epsilon == 1e-5  # as in the published implementation


def test_files_of_other_models() -> None:
    with pytest.raises(ValueError, match="model_type must be 'moduleformer', got 'mixtral'"):
        MoLMConfig.from_reference({"model_type": "mixtral", "vocab_size": 10})


def test_what_the_published_format_cannot_say() -> None:
    for changes in (
        {"n_layer": 2, "n_mlp_experts": [4, 5]},
        {"router_order": "topk_softmax"},
        {"activation_function": "swiglu"},
        {"layer_norm_epsilon": 1e-6},
    ):
        with pytest.raises(ValueError, match=f"{list(changes)[-1]} must be .* in the published format"):
            MoLMConfig.from_dict(changes).to_reference()
    uniform = MoLMConfig(
        n_layer=2, ffn=ExpertsConfig(hidden=8, num_experts=(4, 4)), aux_loss_type="concentration", aux_loss_weight=0.1
    )
    fields = uniform.to_reference()
    assert (fields["n_mlp_experts"], fields["aux_loss_type"], fields["aux_loss_weight"]) == (4, "mi", 0)


def test_configurations_are_values() -> None:
    config = MoLMConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_embd = 3  # type: ignore[misc]
    assert config.replace(n_embd=512) == MoLMConfig(n_embd=512)


def test_experts_go_by_their_published_names_outside() -> None:
    attention = ExpertsConfig(hidden=64, num_experts=(3, 4), k=1, normaliser_rows=(0, 2), num_new=(1, 0))
    ffn = ExpertsConfig(hidden=48, num_experts=6, k=3, places=((0, 1, 2, 3, 4, 5, -1), (5, 4, 3, 2, 1, 0)))
    config = MoLMConfig(n_layer=2, attention=attention, ffn=ffn)
    fields = {
        "att_hidden": 64,
        "n_att_experts": [3, 4],
        "k_att": 1,
        "att_normaliser_rows": [0, 2],
        "n_new_att_experts": [1, 0],
        "att_expert_places": None,
        "ffd_hidden": 48,
        "n_mlp_experts": 6,
        "k_mlp": 3,
        "mlp_normaliser_rows": 0,
        "n_new_mlp_experts": 0,
        "mlp_expert_places": [[0, 1, 2, 3, 4, 5, -1], [5, 4, 3, 2, 1, 0]],
    }
    written = json.loads(json.dumps(config.to_dict()))
    assert {name: written[name] for name in fields} == fields
    assert MoLMConfig.from_dict({"n_layer": 2, **fields}) == config == MoLMConfig.from_dict(written)
    assert MoLMConfig(n_layer=2).replace(**fields) == config
    assert config.replace(attention=ExpertsConfig(hidden=8), k_att=3).attention == ExpertsConfig(hidden=8, k=3)
    assert (config.num_experts("attention"), config.num_experts("ffn")) == ((3, 4), (6, 6))


def test_every_field_of_experts_is_checked() -> None:
    for kind, names in PUBLISHED_NAMES.items():
        for name, published in names.items():
            for value in ("x", 1.5, [None] * 24, [["x"]] * 24):
                with pytest.raises(ValueError, match=f"MoLMConfig: {published} must be "):
                    MoLMConfig(**{kind: dataclasses.replace(getattr(MoLMConfig(), kind), **{name: value})})
