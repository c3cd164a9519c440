"""Directories: published ones, our own and what transformers writes, read by both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import PUBLISHED, VOCAB, make_pair, tokens, write_published
from small_models import BASE, random_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from moduleformer_ext import hf
from moduleformer_ext.hf import requirements
from moduleformer_ext.models import MoLM, MoLMConfig, MoLMForCausalLM
from moduleformer_ext.nn import Linear
from moduleformer_ext.surgery import ExpertUsage, plan_by_size, prune

LAYOUTS = ["one safetensors", "one bin", "sharded safetensors", "sharded bin"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_directory_as_downloaded(layout: str, tmp_path: Path) -> None:
    native = write_published(tmp_path, layout)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is hf.ModuleFormerForCausalLM and not model.training
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.molm == native.config and model.config.molm.layer_norm_epsilon == 1e-5
    x = tokens(2, 9)
    assert torch.equal(model(x).logits, native(x).uncast_logits)
    below = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(below(x).last_hidden_state, native(x).last_hidden_state)


def test_names_and_shapes_are_ours(pair: tuple[Any, Any]) -> None:
    native, model = pair
    shapes = {name: tensor.shape for name, tensor in native.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_our_own_directory_and_back(pair: tuple[Any, Any], tmp_path: Path) -> None:
    native, _ = pair
    native.save_pretrained(tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    x = tokens(2, 9)
    assert torch.equal(model(x).logits, native(x).uncast_logits)
    for size in ("10MB", "5KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        assert (size == "5KB") == (tmp_path / size / "model.safetensors.index.json").is_file()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / size)
        assert torch.equal(again(x).logits, native(x).uncast_logits)
        ours = MoLMForCausalLM.from_pretrained(tmp_path / size)
        assert ours.config == native.config and torch.equal(ours(x).logits, native(x).logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_mlp_experts": [5, 3], "n_att_experts": [2, 4], "router_order": "topk_softmax"},
        {"gate_type": "gmm", "activation_function": "swiglu", "layer_norm_epsilon": 1e-3, "eos_token_id": [3, 4]},
        {"gate_type": "linear", "stick_epsilon": 1e-3, "aux_loss_type": "concentration"},
        {"mlp_normaliser_rows": [0, 2], "mlp_expert_places": [[0, 1, 2, 3, 4], [0, -1, 1, 2, 3, 4, -1]]},
    ],
)
def test_what_published_files_cannot_say_survives(changes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    native = MoLMForCausalLM(MoLMConfig.from_dict(BASE | changes)).eval()
    hf.from_native(native).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.molm == native.config
    again = MoLMForCausalLM.from_pretrained(tmp_path)
    x = tokens(1, 9)
    assert again.config == native.config
    assert torch.equal(model(x).logits, native(x).uncast_logits) and torch.equal(again(x).logits, native(x).logits)


def test_a_pruned_model(tmp_path: Path) -> None:
    native = random_model(torch.float32)
    usage = ExpertUsage()
    with torch.no_grad():
        usage.add(native(tokens(4, 32), output_routes=True).routes)
    small = prune(native, plan_by_size(native.config, usage, 0.8, keep_normaliser=True))
    hf.from_native(small).save_pretrained(tmp_path)
    x = tokens(1, 9)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(x).logits, small(x).uncast_logits)
    assert hf.to_native(model).config == small.config


def test_conversion_shares_memory_and_keeps_the_mode() -> None:
    native = random_model(torch.float32).train()
    model = hf.from_native(native)
    assert model.training and model.lm_head.weight.data_ptr() == native.lm_head.weight.data_ptr()
    back = hf.to_native(model.eval())
    assert not back.training and back.lm_head.weight.data_ptr() == native.lm_head.weight.data_ptr()


def test_dtype_and_device_map(tmp_path: Path) -> None:
    native = write_published(tmp_path, "sharded safetensors")
    x = tokens(2, 9)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    ours = MoLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(narrow(x).logits, ours(x).uncast_logits)
    pytest.importorskip("accelerate")
    for device_map in ("cpu", {"": "cpu"}, {"transformer": "cpu", "lm_head": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(model(x).logits, native(x).uncast_logits)


def test_models_are_loaded_by_way_of_the_meta_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_published(tmp_path, "one safetensors")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert all(p.is_meta for p in model.parameters())
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda t, *_, **__: drawn.append(t) or t)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda t, *_, **__: drawn.append(t) or t)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(t.is_meta for t in drawn)


def test_first_weights_are_drawn_as_ours() -> None:
    config = hf.ModuleFormerConfig.of(MoLMConfig.preset("molm-nano", gate_type="gmm", att_hidden=64))
    torch.manual_seed(0)
    model, native = hf.ModuleFormerForCausalLM(config), MoLMForCausalLM(config.molm)
    for name, expected in native.named_parameters():
        weight = model.get_parameter(name)
        for measure in (lambda t: t.square().mean().sqrt(), lambda t: t.abs().max()):
            torch.testing.assert_close(measure(weight), measure(expected), rtol=0.35, atol=1e-6, msg=name)


@pytest.mark.parametrize("layout", ["one safetensors", "sharded bin"])
def test_tied_weights(layout: str, tmp_path: Path) -> None:
    native = write_published(tmp_path, layout, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight
    x = tokens(2, 9)
    assert torch.equal(model(x).logits, native(x).uncast_logits)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.lm_head.weight is again.transformer.wte.weight and torch.equal(again(x).logits, model(x).logits)
    assert torch.equal(MoLMForCausalLM.from_pretrained(tmp_path / "again")(x).logits, model(x).logits)
    assert hf.from_native(native).lm_head.weight.data_ptr() == native.transformer.wte.weight.data_ptr()


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_grows_and_shrinks(tied: bool, tmp_path: Path) -> None:
    native, model = make_pair(tie_word_embeddings=tied)
    x = tokens(1, 9)
    expected = native(x).uncast_logits
    model.resize_token_embeddings(VOCAB + 8)
    assert type(model.lm_head) is Linear and model.config.vocab_size == VOCAB + 8
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    logits = model(x).logits
    assert logits.shape[-1] == VOCAB + 8
    torch.testing.assert_close(logits[..., :VOCAB], expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(MoLMForCausalLM.from_pretrained(tmp_path)(x).uncast_logits, logits)
    model.resize_token_embeddings(VOCAB)
    torch.testing.assert_close(model(x).logits, expected)


def test_a_classifier_from_a_language_model_and_from_its_own_directory(tmp_path: Path) -> None:
    native = write_published(tmp_path, "one safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    x = tokens(2, 9)
    x[:, -1] = 5  # not the padding
    expected = native(x).last_hidden_state[:, -1] @ model.score.weight.T
    torch.testing.assert_close(model(x).logits, expected)
    model.save_pretrained(tmp_path / "classifier")
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not info["missing_keys"] and again.config.num_labels == 3
    assert torch.equal(again(x).logits, model(x).logits)
    below = MoLM.from_reference(json.loads((tmp_path / "config.json").read_text()), again.state_dict())
    assert torch.equal(below(x).last_hidden_state, native(x).last_hidden_state)


class TestBadInput:
    def test_missing_weights(self, tmp_path: Path) -> None:
        write_published(tmp_path, "one bin")
        state = torch.load(tmp_path / "pytorch_model.bin")
        del state["transformer.h.1.mlpf.experts.weight"], state["lm_head.weight"]
        torch.save(state, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"must hold all weights .* lacks lm_head.weight, transformer.h.1.mlpf"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_a_classifier_is_no_language_model(self, tmp_path: Path) -> None:
        write_published(tmp_path, "one safetensors")
        AutoModelForSequenceClassification.from_pretrained(tmp_path).save_pretrained(tmp_path / "classifier")
        with pytest.raises(ValueError, match=r"lacks lm_head.weight"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "classifier")

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        write_published(tmp_path, "sharded safetensors")
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(OSError, match="model-00002-of-00003"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_weights_of_another_shape(self, tmp_path: Path) -> None:
        write_published(tmp_path, "one safetensors")
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | {"ffd_hidden": 16}))
        with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|mismatch"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "everything"])
    def test_files_that_are_not_there(self, missing: str, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        if missing != "everything":
            folder.mkdir()
            write_published(folder, "one safetensors")
            (folder / missing).unlink()
        with pytest.raises((OSError, ValueError), match="/model'" if missing == "everything" else missing):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_parallel_plans(self, tmp_path: Path) -> None:
        write_published(tmp_path, "one safetensors")
        with pytest.raises(ValueError, match="tp_plan must be None for a MoLM; use fully_shard"):
            AutoModelForCausalLM.from_pretrained(tmp_path, tp_plan="auto")

    def test_an_unknown_model_type(self, tmp_path: Path) -> None:
        write_published(tmp_path, "one safetensors")
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | {"model_type": "sparsetron"}))
        with pytest.raises(ValueError, match="sparsetron"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="model_type must be 'moduleformer', got 'sparsetron'"):
            hf.ModuleFormerForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="model_type must be 'moduleformer', got 'sparsetron'"):
            MoLMForCausalLM.from_pretrained(tmp_path)

    def test_fields_that_contradict_one_another(self) -> None:
        with pytest.raises(ValueError, match="MoLMConfig: k_mlp must be at most n_mlp_experts"):
            hf.ModuleFormerConfig(k_mlp=8, n_mlp_experts=4)
        config = hf.ModuleFormerConfig(n_mlp_experts=4)
        config.num_experts_per_tok = 8
        with pytest.raises(ValueError, match="MoLMConfig: k_mlp must be at most n_mlp_experts"):
            hf.ModuleFormerForCausalLM(config)

    def test_transformers_absent_or_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(requirements.metadata, "version", lambda _: "4.57.1")
        with pytest.raises(ImportError, match=r"needs transformers >= 5.17, found 4.57.1; install it with: pip"):
            requirements.check()
        monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ImportError, match=r"found none; install it with: pip install 'moduleformer_ext\[hf\]'"):
            requirements.check()


def test_the_standard_names_of_fields() -> None:
    config = hf.ModuleFormerConfig(hidden_size=64, num_hidden_layers=3, num_experts_per_tok=1)
    assert (config.n_embd, config.n_layer, config.k_mlp, config.hidden_size) == (64, 3, 1, 64)
    assert set(MoLMConfig().to_dict()) <= set(config.to_dict())
    assert hf.ModuleFormerConfig().molm == MoLMConfig()
