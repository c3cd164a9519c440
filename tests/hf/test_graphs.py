"""torch.compile and torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import tokens
from transformers import CompileConfig

from moduleformer_ext import hf
from moduleformer_ext.hf.modeling import CACHE


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def test_forward_and_backward_compile_in_one_graph(pair: tuple[Any, Any]) -> None:
    native, model = pair
    x = tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(x, labels=x, output_router_logits=True)
    expected = native(x, labels=x)
    torch.testing.assert_close(output.logits, expected.uncast_logits)
    torch.testing.assert_close(output.loss, expected.loss)
    output.loss.backward()
    expected.loss.backward()
    for name, parameter in native.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)


@torch.no_grad()
def test_a_decoding_step_compiles_once(pair: tuple[Any, Any]) -> None:
    _, model = pair
    x = tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = hf.ModuleFormerStaticCache(2, 16)
    model(x[:, :4], cache=cache)
    mask = torch.ones(2, 16, dtype=torch.long)
    torch._dynamo.utils.counters.clear()
    for i in range(4, 12):
        output = compiled(x[:, i : i + 1], attention_mask=mask, cache=cache)
        torch.testing.assert_close(output.logits, model(x[:, : i + 1]).logits[:, -1:])
    assert output[CACHE] is cache and cache.get_seq_length() == 12
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_generate_compiles_its_steps(pair: tuple[Any, Any]) -> None:
    native, model = pair
    x, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    torch._dynamo.utils.counters.clear()
    found = model.generate(x, cache_implementation="static", compile_config=compile_config, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(found, native.generate(x, 8, attention_mask=mask))


def test_export(pair: tuple[Any, Any], tmp_path: Path) -> None:
    _, model = pair
    x = tokens(2, 9)
    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(
        model, (x,), {"use_cache": False}, dynamic_shapes={"input_ids": {1: length}, "use_cache": None}
    )
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for n in (9, 5):
        torch.testing.assert_close(loaded(x[:, :n], use_cache=False).logits, model(x[:, :n]).logits)


@torch.no_grad()
def test_export_of_a_prompt_and_a_step(pair: tuple[Any, Any]) -> None:
    """Outputs hold the cache, which is an input of the next program."""
    _, model = pair
    x = tokens(2, 9)
    prompt = torch.export.export(model, (x,), {"use_cache": True}).module()
    output = prompt(x, use_cache=True)
    torch.testing.assert_close(output.logits, model(x).logits)
    assert isinstance(output[CACHE], hf.ModuleFormerCache) and output[CACHE].get_seq_length() == 9

    cache = hf.ModuleFormerStaticCache(2, 16)
    model(x, cache=cache)
    step = tokens(2, 1, seed=3)
    expected = model(torch.cat([x, step], 1)).logits[:, -1:]
    program = torch.export.export(model, (step,), {"cache": cache}, strict=False)
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(program.module()(step, cache=cache).logits, expected)
