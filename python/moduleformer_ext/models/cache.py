"""What a model remembers of the tokens it has read: the keys and values of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from moduleformer_ext.nn import LayerCache, StaticLayerCache

Pair = tuple[Tensor, Tensor]


@dataclass(eq=False, repr=False)
class KVCache(Sequence[Pair]):
    """Keys and values of all layers for the tokens read so far; also the history of Transformer-XL training.

    It is passed as ``past_key_values``, and comes back extended. Like a value it is never changed under the caller:
    two continuations of one past do not disturb each other, from several threads either. Without autograd extending
    it is amortised O(new tokens), for one continuation; the others copy, and so does one that crosses into
    ``torch.inference_mode`` or out of it. To pytrees it is its tensors.

    As a sequence it yields one pair (keys, values) per layer, [B, length, att_hidden] each; where values are the
    keys, both are the same tensor. ``KVCache.from_pairs`` takes such a sequence back.
    """

    layers: Sequence[LayerCache]

    def __post_init__(self) -> None:
        self.layers = tuple(self.layers)

    @classmethod
    def empty(cls, n_layer: int, capacity: int = 0) -> KVCache:
        """A cache of no tokens that will allocate room for ``capacity`` of them at once."""
        return cls([LayerCache(capacity) for _ in range(n_layer)])

    @classmethod
    def from_pairs(cls, pairs: Sequence[Pair], *, n_head: int, identity_kv: bool) -> KVCache:
        """Take pairs (keys, values) of shape [B, S, att_hidden], one per layer; with ``identity_kv`` the values are
        not kept.
        """
        layers = []
        for keys, values in pairs:
            if keys.dim() != 3 or keys.shape != values.shape:
                raise ValueError(
                    f"KVCache: keys and values must be [B, S, att_hidden] alike, got {list(keys.shape)} "
                    f"and {list(values.shape)}"
                )
            heads = (*keys.shape[:2], n_head, -1)
            layers.append(LayerCache.of(keys.reshape(heads), None if identity_kv else values.reshape(heads)))
        return cls(layers)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors to save, by name; :meth:`from_state_dict` takes them back. A layer that has not seen a token
        has keys of no elements.
        """
        state = {}
        for i, layer in enumerate(self.layers):
            state[f"{i}.keys"] = torch.empty(0, 0, 0, 0) if layer.is_unset else layer.keys
            if layer.values is not None:
                state[f"{i}.values"] = layer.values
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> KVCache:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: names that it does not give.
        """
        n_layer = sum(name.endswith(".keys") for name in state)
        known = {f"{i}.{part}" for i in range(n_layer) for part in ("keys", "values")}
        if unknown := sorted(set(state) - known):
            raise ValueError(
                f"KVCache: state must hold keys, and values if any, of layers 0 to {n_layer - 1}, got "
                f"{', '.join(unknown)}"
            )
        layers = [(state[f"{i}.keys"], state.get(f"{i}.values")) for i in range(n_layer)]
        return cls([LayerCache() if keys.shape[2:] == (0, 0) else LayerCache.of(keys, v) for keys, v in layers])

    @property
    def length(self) -> int:
        """Tokens remembered."""
        return self.layers[0].length if self.layers else 0

    @property
    def batch_size(self) -> int | None:
        """Sequences remembered, None where nothing was read yet."""
        return None if self.length == 0 else self.layers[0].keys.shape[0]

    def last(self, length: int) -> KVCache:
        """Forget all but the last ``length`` tokens."""
        return KVCache([layer.last(length) for layer in self.layers])

    def select(self, rows: Tensor) -> KVCache:
        """The sequences ``rows`` (an index tensor [B']) of the batch, in that order; repeats are allowed."""
        return KVCache([layer.select(rows) for layer in self.layers])

    def to_static(self, capacity: int) -> StaticKVCache:
        """A copy with room for ``capacity`` tokens in all, for compiled decoding.

        Raises:
            ValueError: nothing was read yet, or more than ``capacity`` tokens.
        """
        return StaticKVCache([StaticLayerCache.of(layer, capacity) for layer in self.layers])

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        layer = self.layers[index]
        keys = layer.keys.flatten(2)
        return keys, keys if layer.values is None else layer.values.flatten(2)

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))


@dataclass(eq=False, repr=False)
class StaticKVCache:
    """Keys and values of all layers in storage of a fixed size, for decoding with ``torch.compile``.

    Made by :meth:`KVCache.to_static`, passed as ``past_key_values`` and changed in place: the same object comes back.
    No shape depends on how much is filled, so that a compiled step compiles once. ``attention_mask`` is
    [B, capacity] beside it.
    """

    layers: Sequence[StaticLayerCache]

    def __post_init__(self) -> None:
        self.layers = tuple(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.layers[0].capacity

    @property
    def batch_size(self) -> int:
        """Sequences remembered."""
        return self.layers[0].keys.shape[0]

    @property
    def lengths(self) -> Tensor:
        """[B] int32, tokens remembered of each sequence."""
        return self.layers[0].lengths


torch.export.register_dataclass(KVCache, serialized_type_name="moduleformer_ext.models.KVCache")
torch.export.register_dataclass(StaticKVCache, serialized_type_name="moduleformer_ext.models.StaticKVCache")
