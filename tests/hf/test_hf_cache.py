"""The caches: what they hold, how they are rearranged, that keys which are values are kept once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import tokens
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from transformers import DynamicCache

from moduleformer_ext import hf
from moduleformer_ext.hf.modeling import CACHE


def filled(kind: str, model: Any, x: torch.Tensor) -> Any:
    n_layer = model.config.n_layer
    cache = hf.ModuleFormerCache(n_layer) if kind == "growing" else hf.ModuleFormerStaticCache(n_layer, 20)
    with torch.no_grad():
        assert model(x, past_key_values=cache)[CACHE] is cache
    return cache


@pytest.fixture(params=["growing", "static"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("cut", [3, 8])
def test_reading_in_parts_is_reading_at_once(pair: tuple[Any, Any], kind: str, cut: int) -> None:
    _, model = pair
    x = tokens(2, 9)
    cache = filled(kind, model, x[:, :cut])
    assert cache.get_seq_length() == cut
    with torch.no_grad():
        rest = model(x[:, cut:], cache=cache).logits
    torch.testing.assert_close(rest, model(x).logits[:, cut:])
    assert cache.get_seq_length() == 9


def test_masks_beside_a_cache(pair: tuple[Any, Any], kind: str) -> None:
    _, model = pair
    x, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 2:4] = 0
    expected = model(x, attention_mask=mask).logits[:, 6:]
    cache = hf.ModuleFormerCache(2) if kind == "growing" else hf.ModuleFormerStaticCache(2, 20)
    with torch.no_grad():
        model(x[:, :6], attention_mask=mask[:, :6], cache=cache)
        torch.testing.assert_close(model(x[:, 6:], attention_mask=mask, cache=cache).logits, expected)


def test_rows_are_chosen_and_repeated(pair: tuple[Any, Any], kind: str) -> None:
    _, model = pair
    x = tokens(3, 6)
    step = tokens(6, 1, seed=2)

    def after(rows: list[int], change: Any) -> None:
        cache = filled(kind, model, x)
        change(cache)
        whole = torch.cat([x[rows], step[: len(rows)]], 1)
        with torch.no_grad():
            torch.testing.assert_close(model(step[: len(rows)], cache=cache).logits, model(whole).logits[:, -1:])

    after([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])))
    after([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2))
    after([1], lambda cache: cache.batch_select_indices(torch.tensor([1])))
    after([0, 2], lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])))


def test_tokens_are_forgotten(pair: tuple[Any, Any], kind: str) -> None:
    _, model = pair
    x, step = tokens(2, 6), tokens(2, 2, seed=2)
    cache = filled(kind, model, x)
    cache.crop(-2)
    cache.crop(0)
    assert cache.get_seq_length() == 4 and cache.is_croppable
    with torch.no_grad():
        expected = model(torch.cat([x[:, :4], step], 1)).logits[:, 4:]
        torch.testing.assert_close(model(step, cache=cache).logits, expected)
        for wrong in (1, -7):
            with pytest.raises(ValueError, match=rf"tokens_to_remove must be in \[-6, 0\], got {wrong}"):
                cache.crop(wrong)
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(x, cache=cache).logits, model(x).logits)


def test_keys_that_are_values_are_kept_once(pair: tuple[Any, Any], kind: str) -> None:
    _, model = pair
    cache = filled(kind, model, tokens(2, 6))
    same = model.config.molm.identity_kv
    for layer in cache.layers:
        assert layer.keys.shape[:2] == (2, model.config.n_head) and layer.keys.shape == layer.values.shape
        assert (layer.keys.data_ptr() == layer.values.data_ptr()) == same and (layer.past.values is None) == same
    storages = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(cache) if t.is_floating_point()}
    assert len(storages) == 2 * (1 if same else 2)


@pytest.mark.parametrize(
    "make", [hf.ModuleFormerCache, lambda n: hf.ModuleFormerStaticCache(n, 20), lambda _: DynamicCache()]
)
def test_a_step_runs_on_the_decoding_kernel(pair: tuple[Any, Any], make: Any) -> None:
    _, model = pair
    cache = make(2)
    with torch.no_grad():
        model(tokens(1, 6), past_key_values=cache)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            model(tokens(1, 1), past_key_values=cache)
    names = {event.key.split("::")[-1] for event in profiler.key_averages()}
    op = "stick_attention_decode" if isinstance(cache, DynamicCache) else "blocks_decode"
    assert op in names and "stick_attention" not in names


def test_as_any_cache_of_transformers(kind: str) -> None:
    """``update`` in their layout does what a DynamicCache does."""
    cache = hf.ModuleFormerCache(1) if kind == "growing" else hf.ModuleFormerStaticCache(1, 20)
    other = DynamicCache()
    with torch.no_grad():
        for length in (4, 1, 2):
            keys, values = torch.randn(2, 3, length, 8), torch.randn(2, 3, length, 8)
            ours, theirs = cache.update(keys, values, 0), other.update(keys, values, 0)
            n = cache.get_seq_length()
            assert n == other.get_seq_length()
            assert all(torch.equal(a[:, :, :n], b) for a, b in zip(ours, theirs, strict=True))
    assert cache.get_mask_sizes(1, 0)[0] == (8 if kind == "growing" else 20)
    assert cache.layers[0].get_max_length() == (-1 if kind == "growing" else 20)
    assert cache.is_compileable == (kind == "static")
    with pytest.raises(NotImplementedError, match="offloading of keys and values"):
        cache.layers[0].offload()


def test_a_dynamic_cache_of_theirs(pair: tuple[Any, Any]) -> None:
    _, model = pair
    x = tokens(2, 9)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        with torch.no_grad():
            model(x[:, :5], past_key_values=cache)
            torch.testing.assert_close(model(x[:, 5:], past_key_values=cache).logits, model(x).logits[:, 5:])
        assert cache.get_seq_length() == 9 and cache.layers[0].keys.shape[1:3] == (model.config.n_head, 9)


def test_as_pytrees_and_copies(pair: tuple[Any, Any], kind: str) -> None:
    _, model = pair
    x = tokens(1, 6)
    cache = filled(kind, model, x)
    leaves, spec = pytree.tree_flatten(cache)
    again = pytree.tree_unflatten([leaf.clone() for leaf in leaves], spec)
    copied = copy.deepcopy(cache)
    step = tokens(1, 1, seed=2)
    with torch.no_grad():
        expected = model(step, cache=cache).logits
        assert torch.equal(model(step, cache=again).logits, expected)
        assert torch.equal(model(step, cache=copied).logits, expected)


def test_history_in_training_has_no_gradient_through_it(pair: tuple[Any, Any]) -> None:
    native, model = pair
    x = tokens(2, 12)
    cache = hf.ModuleFormerCache(2)
    model.train()(x[:, :6], labels=x[:, :6], cache=cache)
    model(x[:, 6:], labels=x[:, 6:], cache=cache).loss.backward()
    history = native.train()(x[:, :6], use_cache=True).past_key_values
    native(x[:, 6:], labels=x[:, 6:], past_key_values=history).loss.backward()
    for name, parameter in native.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)
