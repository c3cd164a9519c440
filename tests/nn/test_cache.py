"""Caches of a layer: as values, whoever continues them, and of a fixed size."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from moduleformer_ext.nn import LayerCache, LinearRouter, MixtureOfAttention, StaticLayerCache

D = 16


def token(value: float, length: int = 1) -> Tensor:
    return torch.full((1, length, 2, 3), float(value))


def filled(capacity: int, *values: float) -> LayerCache:
    cache = LayerCache(capacity)
    with torch.no_grad():
        for value in values:
            cache = cache.extend(token(value), -token(value))[2]
    return cache


def contents(cache: LayerCache) -> list[float]:
    assert cache.values is not None and torch.equal(cache.values, -cache.keys)
    assert (cache.keys == cache.keys[:, :, :1, :1]).all()
    return cache.keys[0, :, 0, 0].tolist()


def test_cache_grows_geometrically() -> None:
    cache, moves, where = LayerCache(4), 0, None
    with torch.no_grad():
        for step in range(100):
            keys, values, cache = cache.extend(token(step), -token(step))
            moves += keys.data_ptr() != where
            where = keys.data_ptr()
    assert values is not None and cache.length == 100 and moves <= 7
    assert contents(cache) == list(range(100))


def test_cache_needs_what_fits_the_past() -> None:
    _, _, cache = LayerCache().extend(token(0), None)
    with pytest.raises(ValueError, match="the past must have values of its own"):
        cache.extend(token(0), token(0))
    with pytest.raises(ValueError, match="the layer must have values of its own"):
        filled(4, 0).extend(token(0), None)
    with pytest.raises(ValueError, match=r"keys must be \[1, T, 2, 3\], got \[2, 1, 2, 3\]"):
        cache.extend(torch.zeros(2, 1, 2, 3), None)
    with pytest.raises(ValueError, match=r"values must be \[1, 1, 2, 3\] like the keys, got \[1, 2, 2, 3\]"):
        filled(4, 0).extend(token(0), token(0, 2))
    with pytest.raises(ValueError, match="nothing is stored"):
        _ = LayerCache().keys


@torch.no_grad()
def test_threads_that_continue_one_past_do_not_meet() -> None:
    threads = 4
    barrier = Barrier(threads)

    def branch(past: LayerCache, number: int) -> LayerCache:
        with torch.no_grad():
            barrier.wait()
            for step in range(5):
                value = 10.0 * number + step
                past = past.extend(token(value), -token(value))[2]
            return past

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(200):
            past = filled(64, -1, -2, -3)
            branches = list(pool.map(branch, [past] * threads, range(threads)))
            for number, cache in enumerate(branches):
                assert contents(cache) == [-1, -2, -3, *(10.0 * number + step for step in range(5))]
            assert contents(past) == [-1, -2, -3]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_are_values_too(duplicate: object) -> None:
    past = filled(8, 1)
    twin = duplicate(past)  # type: ignore[operator]
    with torch.no_grad():
        longer = past.extend(token(2), -token(2))[2]
        other = twin.extend(token(3), -token(3))[2]
    assert (contents(longer), contents(other), contents(twin)) == ([1, 2], [1, 3], [1])


@pytest.mark.parametrize("begins_in_inference_mode", [True, False])
def test_inference_mode_may_begin_and_end_between_tokens(begins_in_inference_mode: bool) -> None:
    cache = LayerCache(16)
    for step in range(6):
        with torch.inference_mode((step % 2 == 0) == begins_in_inference_mode), torch.no_grad():
            cache = cache.extend(token(step), -token(step))[2]
    assert contents(cache) == list(range(6))
    keys, _, _ = cache.extend(token(6).requires_grad_(), -token(6))
    keys.square().sum().backward()


def test_what_autograd_saved_of_a_cache_stays_as_it_is() -> None:
    cache = filled(8, 1, 2)
    weight = torch.ones((), requires_grad=True)
    product = (weight * cache.keys).sum()
    with torch.no_grad():
        cache.extend(token(3), -token(3))
    product.backward()
    assert weight.grad == 2 * 3 * (1 + 2)


def test_frozen_keys_are_not_overwritten_before_backward() -> None:
    """Queries that train over keys that do not: each segment's keys are saved until one backward."""
    torch.manual_seed(0)
    layer = MixtureOfAttention(D, D, 1, LinearRouter(D, 4, 2)).double()
    segments = torch.randn(5, 1, 3, D, dtype=torch.float64)
    whole, _, _ = layer(segments.flatten(0, 2)[None])
    past, parts = None, []
    for segment in segments:
        y, _, past = layer(segment, past, None, True)
        parts.append(y)
    (expected,) = torch.autograd.grad(whole.square().sum(), layer.q_proj.experts.weight)
    (actual,) = torch.autograd.grad(torch.cat(parts, 1).square().sum(), layer.q_proj.experts.weight)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("identity", [True, False])
@torch.no_grad()
def test_static_cache_equals_a_growing_one(identity: bool) -> None:
    torch.manual_seed(0)
    layer = MixtureOfAttention(D, D, 1 if identity else 2, LinearRouter(D, 4, 2)).double()
    x = torch.randn(2, 40, D, dtype=torch.float64)
    whole, _, _ = layer(x)
    _, _, past = layer(x[:, :4], None, None, True)
    static, where = StaticLayerCache.of(past, 40), None
    for start, end in ((4, 5), (5, 6), (6, 30), (30, 40)):
        y, _, present = layer(x[:, start:end], static, None, True)
        assert present is static and where in (None, static.keys.data_ptr())
        where = static.keys.data_ptr()
        torch.testing.assert_close(y, whole[:, start:end])
    assert static.lengths.tolist() == [40, 40] and past.length == 4
    before = static.keys.clone()
    with pytest.raises(ValueError, match="keys must fit beside 40 tokens into 40, got 1 more"):
        layer(x[:, :1], static)
    assert torch.equal(static.keys, before)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"got grad mode; use torch\.no_grad"):
        layer(x[:, :1].requires_grad_(), StaticLayerCache.of(past, 8))


def test_static_cache_errors() -> None:
    with pytest.raises(ValueError, match=r"capacity must hold the tokens .* \(2\), got 1"):
        StaticLayerCache.of(filled(4, 1, 2), 1)
    with pytest.raises(ValueError, match="not empty"):
        StaticLayerCache.of(LayerCache(), 4)
    static = StaticLayerCache.of(filled(4, 1), 4)
    with pytest.raises(ValueError, match="the layer must have values of its own as the past does"):
        static.append(token(1), None)
    with pytest.raises(ValueError, match=r"values must be \[1, 1, 2, 3\] like the keys, got \[1, 2, 2, 3\]"):
        static.append(token(1), token(1, 2))
    with pytest.raises(ValueError, match=r"keys must be \[1, T, 2, 3\]"):
        static.append(torch.zeros(2, 1, 2, 3), torch.zeros(2, 1, 2, 3))
    with torch.inference_mode():
        made_there = StaticLayerCache.of(filled(4, 1), 4)
    with torch.no_grad(), pytest.raises(ValueError, match="made in inference mode"):
        made_there.append(token(1), -token(1))
