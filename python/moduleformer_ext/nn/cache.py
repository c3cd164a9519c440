"""Keys and values of one attention layer: as a value that grows, or in storage of a fixed size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_GROWTH = 2


def _check_new_tokens(
    owner: str, keys: Tensor, values: Tensor | None, past_keys: Tensor, past_values: Tensor | None
) -> None:
    """Whether new tokens can follow those of a past, if it were not for their number."""
    shape, past = keys.shape, past_keys.shape
    if shape[0] != past[0] or shape[2:] != past[2:]:
        raise ValueError(f"{owner}: keys must be [{past[0]}, T, {past[2]}, {past[3]}], got {list(shape)}")
    if values is None or past_values is None:
        if (values is None) != (past_values is None):
            has, lacks = ("the layer", "the past") if past_values is None else ("the past", "the layer")
            raise ValueError(f"{owner}: {lacks} must have values of its own as {has} does, got keys only")
    elif values.shape != shape:
        raise ValueError(f"{owner}: values must be {list(shape)} like the keys, got {list(values.shape)}")


class _Storage(NamedTuple):
    """Keys and values [B, S, H, D] whose first tokens are a cache's; the others are room for the next ones."""

    keys: Tensor
    values: Tensor | None
    lengths: Tensor
    """[B] int32, the tokens that are written."""


@dataclass(eq=False, repr=False)
class LayerCache:
    """The keys and values of the tokens that a layer has seen, never part of an autograd graph.

    Where values are the keys (no K/V projections), they are stored once and ``values`` is None. A cache is a value:
    :meth:`extend` returns a longer one and leaves this one as it was, whichever threads continue it. Without autograd
    the new tokens are written after those of the past, where nobody reads; of several continuations of one past, the
    first takes this room and the others copy. To pytrees a cache is its keys and values.

    Args:
        capacity: tokens to allocate for at the first extension.
    """

    capacity: int = 0
    _keys: Tensor | None = None
    _values: Tensor | None = None
    _room: list[_Storage] = field(default_factory=list, init=False)
    """The storage behind keys and values, until a continuation takes it."""

    @classmethod
    def of(cls, keys: Tensor, values: Tensor | None) -> LayerCache:
        """A cache that holds these tensors [B, S, H, D] themselves, detached."""
        return cls(0, keys.detach(), None if values is None else values.detach())

    @property
    def length(self) -> int:
        """Tokens remembered."""
        return 0 if self._keys is None else self._keys.shape[1]

    @property
    def keys(self) -> Tensor:
        """[B, length, H, D]."""
        if self._keys is None:
            raise ValueError("LayerCache: nothing is stored yet")
        return self._keys

    @property
    def values(self) -> Tensor | None:
        """[B, length, H, D], or None where the values are the keys."""
        return self._values

    @property
    def is_unset(self) -> bool:
        """Whether nothing was ever stored, so that even batch and heads are open."""
        return self._keys is None

    def extend(self, keys: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None, LayerCache]:
        """Append new tokens [B, T, H, D].

        Returns:
            The keys and values to attend to, [B, length + T, H, D], through which gradients reach the new tokens
            only, and the cache that holds them.

        Raises:
            ValueError: the new tokens are of another batch or of other heads than the past, their values of another
                shape than their keys, or only one of past and new tokens has values of its own.
        """
        if self._keys is not None:
            _check_new_tokens("LayerCache", keys, values, self._keys, self._values)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            if self.length:
                values = None if values is None or self._values is None else torch.cat([self._values, values], dim=1)
                keys = torch.cat([self.keys, keys], dim=1)
            return keys, values, LayerCache.of(keys, values)

        start, added = self.length, keys.shape[1]
        storage, present = self._continue(keys, values, added)
        # Through .data: no tensor that autograd may have saved ends after `start`, so none of them has changed.
        storage.keys.data.narrow(1, start, added).copy_(keys)
        if storage.values is not None and values is not None:
            storage.values.data.narrow(1, start, added).copy_(values)
        storage.lengths.fill_(start + added)
        return present.keys, present.values, present

    def reserve(self, added: int) -> tuple[LayerCache, Tensor]:
        """Room for new tokens that an op is about to write, after tokens that there are.

        Returns:
            The cache that holds them once they are written, and how many each sequence has now, [B] int32: a tensor
            that whoever writes them must move on.
        """
        storage, present = self._continue(self.keys, self.values, added)
        return present, storage.lengths

    def _continue(self, keys: Tensor, values: Tensor | None, added: int) -> tuple[_Storage, LayerCache]:
        """Storage for keys and values like these, and the cache over it that is ``added`` tokens longer."""
        end = self.length + added
        storage = self._take_room(keys, end) or self._copy(keys, values, end)
        present = LayerCache(
            0, storage.keys.narrow(1, 0, end), None if storage.values is None else storage.values.narrow(1, 0, end)
        )
        if end < storage.keys.shape[1]:
            present._room.append(storage)
        return storage, present

    def _take_room(self, keys: Tensor, end: int) -> _Storage | None:
        try:
            storage = self._room.pop()  # atomic: one of several continuations gets it
        except IndexError:
            return None
        fits = (
            storage.keys.shape[1] >= end
            and storage.keys.dtype == keys.dtype
            and storage.keys.is_inference() == torch.is_inference_mode_enabled()
        )
        return storage if fits else None

    def _copy(self, keys: Tensor, values: Tensor | None, end: int) -> _Storage:
        capacity = max(end, self.capacity if self._keys is None else _GROWTH * self.length)

        def allocate(like: Tensor, stored: Tensor | None) -> Tensor:
            new = like.new_empty(like.shape[0], capacity, *like.shape[2:])
            if stored is not None:
                new[:, : self.length] = stored
            return new

        return _Storage(
            allocate(keys, self._keys),
            None if values is None else allocate(values, self._values),
            torch.full((keys.shape[0],), self.length, dtype=torch.int32, device=keys.device),
        )

    def last(self, length: int) -> LayerCache:
        """The last ``length`` tokens; a copy where that is fewer than there are, so that the rest can be freed."""
        if self.length <= length:
            return self
        start = self.length - length
        values = self.values
        return LayerCache.of(self.keys[:, start:].clone(), None if values is None else values[:, start:].clone())

    def select(self, rows: Tensor) -> LayerCache:
        """The sequences ``rows`` (an index tensor [B']) of the batch."""
        if self.is_unset:
            return self
        values = self.values
        return LayerCache.of(self.keys.index_select(0, rows), None if values is None else values.index_select(0, rows))


@dataclass(eq=False)
class StaticLayerCache:
    """Storage of a fixed size that new tokens are written into, for compiled decoding: no shape ever changes.

    Unlike :class:`LayerCache` it is changed in place, and there is one continuation of it.
    """

    keys: Tensor
    """[B, S, H, D], of which the first ``lengths[b]`` tokens of sequence b are filled."""
    values: Tensor | None
    """As ``keys``, or None where the values are the keys."""
    lengths: Tensor
    """[B] int32."""

    @classmethod
    def of(cls, cache: LayerCache, capacity: int) -> StaticLayerCache:
        """A copy of what a cache holds, with room for ``capacity`` tokens in all."""
        if cache.is_unset or capacity < cache.length:
            raise ValueError(
                f"StaticLayerCache: capacity must hold the tokens of a cache that is not empty ({cache.length}), "
                f"got {capacity}"
            )

        def allocate(stored: Tensor) -> Tensor:
            new = stored.new_zeros(stored.shape[0], capacity, *stored.shape[2:])
            new[:, : cache.length] = stored
            return new

        keys = cache.keys
        lengths = torch.full((keys.shape[0],), cache.length, dtype=torch.int32, device=keys.device)
        return cls(allocate(keys), None if cache.values is None else allocate(cache.values), lengths)

    @property
    def capacity(self) -> int:
        """S."""
        return self.keys.shape[1]

    def append(self, keys: Tensor, values: Tensor | None) -> None:
        """Write new tokens [B, T, H, D] after each sequence's last one.

        Raises:
            ValueError: in grad mode for tokens that require a gradient; for shapes that do not fit, or values for only
                one of past and new tokens; outside of a compiled graph, on the CPU, for more tokens than there is room
                for. Elsewhere lengths are not read: tokens that do not fit overwrite the last place.
        """
        batch, length = keys.shape[:2]
        if torch.is_grad_enabled() and keys.requires_grad:
            raise ValueError("StaticLayerCache: keys must not require a gradient, got grad mode; use torch.no_grad()")
        _check_new_tokens("StaticLayerCache", keys, values, self.keys, self.values)
        if not torch.compiler.is_compiling():
            if self.keys.is_inference() and not torch.is_inference_mode_enabled():
                raise ValueError("StaticLayerCache: made in inference mode, must be continued in it, got normal mode")
            if self.keys.device.type == "cpu" and (most := int(self.lengths.max())) + length > self.capacity:
                raise ValueError(
                    f"StaticLayerCache: keys must fit beside {most} tokens into {self.capacity}, got {length} more"
                )
        rows = torch.arange(batch, device=keys.device)[:, None]
        positions = (self.lengths[:, None] + torch.arange(length, device=keys.device)).clamp(max=self.capacity - 1)
        self.keys[rows, positions] = keys.to(self.keys.dtype)
        if self.values is not None and values is not None:
            self.values[rows, positions] = values.to(self.values.dtype)
        self.lengths.add_(length)


pytree.register_dataclass(
    LayerCache,
    field_names=["_keys", "_values"],
    drop_field_names=["capacity"],
    serialized_type_name="moduleformer_ext.nn.LayerCache",
)
torch.export.register_dataclass(StaticLayerCache, serialized_type_name="moduleformer_ext.nn.StaticLayerCache")
