"""What cannot be is said in words: names that contradict one another, empty prompts, caches that do not fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import make_pair, tokens, write_published
from transformers import AutoConfig, AutoModelForCausalLM

from moduleformer_ext.hf import (
    ModuleFormerCache,
    ModuleFormerConfig,
    ModuleFormerForCausalLM,
    ModuleFormerStaticCache,
    save_directory,
)
from moduleformer_ext.models import MoLMForCausalLM


@pytest.fixture
def model() -> ModuleFormerForCausalLM:
    return make_pair()[1].eval()


def test_two_names_of_one_field(tmp_path: Path) -> None:
    assert ModuleFormerConfig(n_embd=64, hidden_size=64).n_embd == 64
    for fields, names in (
        ({"n_embd": 64, "hidden_size": 32}, "n_embd and hidden_size"),
        ({"num_experts": 4, "num_local_experts": 6}, "num_experts and num_local_experts"),
    ):
        with pytest.raises(ValueError, match=f"{names} are names of one field and must agree"):
            ModuleFormerConfig(**fields)
    native, _ = make_pair()
    for write in (native.save_pretrained, lambda folder: write_published(folder, "one safetensors")):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        write(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
        with pytest.raises(ValueError, match="n_layer and num_hidden_layers are names of one field"):
            AutoConfig.from_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["n_layer"]}))
        assert AutoConfig.from_pretrained(folder).n_layer == config["n_layer"]


@pytest.mark.parametrize("kind", ["native", "hf"])
def test_routers_stay_more_precise_than_the_rest(kind: str, tmp_path: Path) -> None:
    native, _ = make_pair()
    native = native.bfloat16()
    for name, parameter in native.named_parameters():
        if ".gate." in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    if kind == "native":
        native.save_pretrained(tmp_path)
    else:
        save_directory(native, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    for model in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "again")):
        expected = dict(native.named_parameters())
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if ".gate." in name else torch.bfloat16), name
            assert torch.equal(parameter, expected[name]), name
        assert torch.equal(model(tokens(1, 9)).logits, native(tokens(1, 9)).uncast_logits)
    again = dict(MoLMForCausalLM.from_pretrained(tmp_path / "again").named_parameters())
    assert all(parameter.dtype == again[name].dtype for name, parameter in native.named_parameters())
    with pytest.raises(ValueError, match="router_dtype must be None or 'float32', got 'bfloat16'"):
        ModuleFormerConfig(router_dtype="bfloat16")


def test_models_of_one_type_say_nothing_of_routers(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        native, _ = make_pair()
        save_directory(native.to(dtype), tmp_path / str(dtype))
        assert json.loads((tmp_path / str(dtype) / "config.json").read_text()).get("router_dtype") is None
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype))
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


def test_empty_prompts(model: ModuleFormerForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"generate: input_ids must be \[batch, tokens >= 1\], got shape \[1, 0\]"):
        model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"generate: inputs_embeds must be \[batch, tokens >= 1\]"):
        model.generate(inputs_embeds=torch.empty(1, 0, model.config.n_embd), max_new_tokens=2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_static_caches_that_are_too_small(model: ModuleFormerForCausalLM) -> None:
    layers, prompt = model.config.n_layer, tokens(1, 10)
    with torch.no_grad(), pytest.raises(ValueError, match=r"static cache must be at least 10, .* got 4"):
        model(prompt, past_key_values=ModuleFormerStaticCache(layers, 4), use_cache=True)
    with pytest.raises(ValueError, match="static cache must have room for 14 tokens, prompt and new ones, got capac"):
        model.generate(prompt, max_new_tokens=5, past_key_values=ModuleFormerStaticCache(layers, 13))
    enough = model.generate(prompt, max_new_tokens=5, past_key_values=ModuleFormerStaticCache(layers, 14))
    assert torch.equal(enough, model.generate(prompt, max_new_tokens=5))


@pytest.mark.parametrize(
    "make", [ModuleFormerCache, lambda layers: ModuleFormerStaticCache(layers, 20)], ids=["growing", "static"]
)
@torch.no_grad()
def test_caches_of_another_type(make: Callable[[int], ModuleFormerCache], model: ModuleFormerForCausalLM) -> None:
    cache = make(model.config.n_layer)
    model(tokens(1, 10), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"the cache must be of the model's type, torch.bfloat16, got torch.float32"):
        copy.deepcopy(model).bfloat16()(tokens(1, 1), past_key_values=cache, use_cache=True)
    with torch.autocast("cpu", torch.bfloat16):
        own = make(model.config.n_layer)
        for _ in range(2):
            model(tokens(1, 3), past_key_values=own, use_cache=True)
