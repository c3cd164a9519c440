"""What a model remembers, as transformers' generation handles it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from moduleformer_ext.nn import LayerCache, StaticLayerCache

Past = LayerCache | StaticLayerCache


class _Layer(CacheLayerMixin):
    """What both kinds of layers share. Tensors are [B, H, S, D] here as everywhere in transformers."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first tokens bring storage with them."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            batch = self.keys.shape[0]
            self.reorder_cache(torch.arange(batch, device=self.keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(torch.arange(self.keys.shape[0], device=self.keys.device)[indices.to(self.keys.device)])

    def offload(self) -> None:
        raise NotImplementedError("ModuleFormerCache: offloading of keys and values is not supported")

    prefetch = offload


class ModuleFormerLayer(_Layer):
    """Keys and values of one layer, as a :class:`moduleformer_ext.nn.LayerCache` in ``past``: where values are the
    keys, they are kept once.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__(capacity)
        self.past = LayerCache(capacity)

    @property
    def is_initialized(self) -> bool:
        return not self.past.is_unset

    @property
    def keys(self) -> Tensor | None:
        return None if self.past.is_unset else self.past.keys.transpose(1, 2)

    @property
    def values(self) -> Tensor | None:
        return self.keys if self.past.values is None else self.past.values.transpose(1, 2)

    def store(self, present: Past) -> None:
        """Take what a pass over new tokens returned."""
        if not isinstance(present, LayerCache):
            raise TypeError(f"ModuleFormerLayer: present must be a LayerCache, got {type(present).__name__}")
        self.past = present

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = key_states.transpose(1, 2)
        values = None if value_states is key_states else value_states.transpose(1, 2)
        keys, values, self.past = self.past.extend(keys, values)
        return keys.transpose(1, 2), (keys if values is None else values).transpose(1, 2)

    def get_seq_length(self) -> int:
        return self.past.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.past = LayerCache(self.capacity)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self.past = self.past.select(beam_idx.to(self.past.keys.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if self.is_initialized and (removed := _removed(tokens_to_remove, self.past.length)):
            length, values = self.past.length - removed, self.past.values
            self.past = LayerCache.of(self.past.keys[:, :length], None if values is None else values[:, :length])


class ModuleFormerStaticLayer(_Layer):
    """Keys and values of one layer in storage of a fixed size: a :class:`moduleformer_ext.nn.StaticLayerCache` in
    ``past`` once the first tokens were read.
    """

    is_compileable = True

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.past: StaticLayerCache | None = None

    @property
    def is_initialized(self) -> bool:
        return self.past is not None

    @property
    def keys(self) -> Tensor | None:
        return None if self.past is None else self.past.keys.transpose(1, 2)

    @property
    def values(self) -> Tensor | None:
        if self.past is None or self.past.values is None:
            return self.keys
        return self.past.values.transpose(1, 2)

    def store(self, present: Past) -> None:
        """Take what a pass over the first tokens returned; later ones wrote into the storage themselves."""
        if not isinstance(present, LayerCache):
            self.past = present
            return
        self.past = StaticLayerCache.of(present, self.capacity)
        if not torch.compiler.is_compiling():  # CUDA graphs then write into this storage instead of being left out
            for tensor in (self.past.keys, self.past.values, self.past.lengths):
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = key_states.transpose(1, 2)
        values = None if value_states is key_states else value_states.transpose(1, 2)
        if self.past is None:
            self.store(LayerCache.of(keys, values))
        else:
            self.past.append(keys, values)
        return self.keys, self.values  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0

    def get_seq_length(self) -> int:
        return 0 if self.past is None else int(self.past.lengths.max())

    def get_max_length(self) -> int:
        return self.capacity

    def reset(self) -> None:
        if self.past is not None:
            self.past.lengths.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In place where the batch stays as large as it was: a compiled step knows the storage."""
        if self.past is None:
            return
        past, rows = self.past, beam_idx.to(self.past.lengths.device)
        values = None if past.values is None else past.values.index_select(0, rows)
        chosen = StaticLayerCache(past.keys.index_select(0, rows), values, past.lengths.index_select(0, rows))
        if len(rows) != len(past.lengths):
            self.past = chosen
            return
        past.keys.copy_(chosen.keys)
        past.lengths.copy_(chosen.lengths)
        if past.values is not None and chosen.values is not None:
            past.values.copy_(chosen.values)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if self.past is not None:
            self.past.lengths.sub_(_removed(tokens_to_remove, self.get_seq_length()))


def _removed(tokens_to_remove: int, length: int) -> int:
    if not -length <= tokens_to_remove <= 0:
        raise ValueError(f"crop: tokens_to_remove must be in [{-length}, 0], got {tokens_to_remove}")
    return -tokens_to_remove


class ModuleFormerCache(Cache):
    """Keys and values of all layers, growing; those that are the same are kept once.

    Args:
        n_layer: layers of the model.
        capacity: tokens to allocate for at the first pass.
    """

    def __init__(self, n_layer: int, capacity: int = 0) -> None:
        super().__init__(layers=[ModuleFormerLayer(capacity) for _ in range(n_layer)])


class ModuleFormerStaticCache(Cache):
    """Keys and values of all layers in storage of a fixed size, for compiled decoding.

    Args:
        n_layer: layers of the model.
        capacity: tokens that there is room for.
    """

    def __init__(self, n_layer: int, capacity: int) -> None:
        super().__init__(layers=[ModuleFormerStaticLayer(capacity) for _ in range(n_layer)])


class _BorrowedLayer:
    """One layer of a DynamicCache, in the place of a LayerCache; it keeps equal keys and values twice."""

    def __init__(self, cache: DynamicCache, index: int) -> None:
        self.cache, self.index = cache, index

    @property
    def past(self) -> Any:
        return self

    @property
    def length(self) -> int:
        return self.cache.get_seq_length(self.index)

    def extend(self, keys: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None, Any]:
        heads = keys.transpose(1, 2)
        all_keys, all_values = self.cache.update(heads, heads if values is None else values.transpose(1, 2), self.index)
        return all_keys.transpose(1, 2), None if values is None else all_values.transpose(1, 2), self

    def store(self, present: Any) -> None:
        """Nothing: the cache has it."""


def cache_layers(cache: Cache, n_layer: int) -> list[Any]:
    """The layers of a cache, each with ``past`` to give to a block and ``store`` for what it returns.

    Raises:
        TypeError: a kind of cache that a MoLM cannot use.
        ValueError: another number of layers.
    """
    if isinstance(cache, (ModuleFormerCache, ModuleFormerStaticCache)):
        if len(cache.layers) != n_layer:
            raise ValueError(f"ModuleFormerModel: the cache must have {n_layer} layers, got {len(cache.layers)}")
        return cache.layers
    plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
    if not plain or getattr(cache, "offloading", False):
        raise TypeError(
            "ModuleFormerModel: the cache must be a ModuleFormerCache, a ModuleFormerStaticCache or a DynamicCache "
            f"without offloading or sliding windows, got {type(cache).__name__}"
        )
    return [_BorrowedLayer(cache, index) for index in range(n_layer)]


def _register(kind: type[ModuleFormerCache] | type[ModuleFormerStaticCache]) -> None:
    """As a pytree a cache is what its layers remember."""

    def unflatten(pasts: Iterable[Any], capacity: int) -> Cache:
        pasts = list(pasts)
        cache = kind(len(pasts), capacity)
        for layer, past in zip(cache.layers, pasts, strict=True):
            layer.past = past
        return cache

    pytree.register_pytree_node(
        kind,
        lambda cache: ([layer.past for layer in cache.layers], cache.layers[0].capacity),
        unflatten,
        serialized_type_name=f"moduleformer_ext.hf.{kind.__name__}",
        flatten_with_keys_fn=lambda cache: (
            [(pytree.SequenceKey(i), layer.past) for i, layer in enumerate(cache.layers)],
            cache.layers[0].capacity,
        ),
    )


_register(ModuleFormerCache)
_register(ModuleFormerStaticCache)
