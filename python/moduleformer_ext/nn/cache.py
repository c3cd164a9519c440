"""Keys and values of one attention layer."""

from __future__ import annotations

import torch
from torch import Tensor

_GROWTH = 2


class _Buffer:
    """Storage that several caches may share; each of them reads a prefix of it."""

    def __init__(self, keys: Tensor, values: Tensor | None, filled: int) -> None:
        self.keys = keys
        self.values = values
        self.filled = filled


class LayerCache:
    """The keys and values of the tokens that a layer has seen, never part of an autograd graph.

    Where values are the keys (no K/V projections), they are stored once and ``values`` is None. A cache is a value:
    :meth:`extend` returns a longer one and leaves this one as it was. Without autograd the new tokens are written
    into the storage behind it, which is copied only when it is full or when another continuation of the same past
    has already written there.

    Args:
    capacity: tokens to allocate for at the first extension.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.length = 0
        self._capacity = capacity
        self._buffer: _Buffer | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor | None) -> LayerCache:
        """A cache that holds these tensors [B, S, H, D] themselves, detached."""
        return cls._prefix(
            _Buffer(keys.detach(), None if values is None else values.detach(), keys.shape[1]), keys.shape[1]
        )

    @classmethod
    def _prefix(cls, buffer: _Buffer, length: int) -> LayerCache:
        cache = cls()
        cache._buffer, cache.length = buffer, length
        return cache

    def _stored(self) -> _Buffer:
        if self._buffer is None:
            raise ValueError("LayerCache: nothing is stored yet")
        return self._buffer

    @property
    def keys(self) -> Tensor:
        """[B, length, H, D]."""
        return self._stored().keys[:, : self.length]

    @property
    def values(self) -> Tensor | None:
        """[B, length, H, D], or None where the values are the keys."""
        values = self._stored().values
        return None if values is None else values[:, : self.length]

    def extend(self, keys: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None, LayerCache]:
        """Append new tokens [B, T, H, D].

        Returns the keys and values to attend to, [B, length + T, H, D], through which gradients reach the new tokens
        only, and the cache that holds them.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or (values is not None and values.requires_grad)):
            all_keys, all_values = keys, values
            if self.length:
                all_keys = torch.cat([self.keys, keys], dim=1)
                all_values = None if values is None else torch.cat([self._values_like(values), values], dim=1)
            return all_keys, all_values, LayerCache.of(all_keys, all_values)

        end = self.length + keys.shape[1]
        buffer = self._room_for(end, keys, values)
        buffer.keys[:, self.length : end] = keys.detach()
        if values is not None and buffer.values is not None:
            buffer.values[:, self.length : end] = values.detach()
        buffer.filled = end
        present = LayerCache._prefix(buffer, end)
        return present.keys, present.values, present

    def _values_like(self, values: Tensor) -> Tensor:
        stored = self.values
        if stored is None:
            raise ValueError("LayerCache: the past holds keys only, but the layer has values of its own")
        return stored

    def _room_for(self, end: int, keys: Tensor, values: Tensor | None) -> _Buffer:
        """Storage whose first ``length`` tokens are this cache's and whose tokens up to ``end`` are free to write."""
        old = self._buffer
        if old is not None and old.filled == self.length and old.keys.shape[1] >= end:
            return old
        capacity = max(end, self._capacity) if old is None else max(end, _GROWTH * self.length)

        def allocate(like: Tensor, stored: Tensor | None) -> Tensor:
            new = like.new_empty(like.shape[0], capacity, *like.shape[2:])
            if stored is not None:
                new[:, : self.length] = stored
            return new

        if old is None:
            return _Buffer(allocate(keys, None), None if values is None else allocate(values, None), self.length)
        new_values = None if values is None else allocate(values, self._values_like(values))
        return _Buffer(allocate(keys, self.keys), new_values, self.length)

    def last(self, length: int) -> LayerCache:
        """The last ``length`` tokens; a copy where that is fewer than there are, so that the rest can be freed."""
        if self.length <= length:
            return self
        start = self.length - length
        values = self.values
        return LayerCache.of(self.keys[:, start:].clone(), None if values is None else values[:, start:].clone())

    def select(self, rows: Tensor) -> LayerCache:
        """The sequences ``rows`` (an index tensor [B']) of the batch."""
        if self.length == 0:
            return self
        values = self.values
        return LayerCache.of(self.keys.index_select(0, rows), None if values is None else values.index_select(0, rows))
