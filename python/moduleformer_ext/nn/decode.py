"""A block's step for a few new tokens as two ops instead of a dozen: in a small model most time went between them.

Where more than weights matters (hooks, adapters, dropout, gradients, autocast, a graph being compiled, a head that the
kernels need padded) the modules are called one by one. The results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

from moduleformer_ext import ops
from moduleformer_ext.nn.attention import HEAD_MULTIPLE, MixtureOfAttention, RoutedProjection
from moduleformer_ext.nn.cache import LayerCache, StaticLayerCache
from moduleformer_ext.nn.experts import ExpertLinear, MixtureOfFFN
from moduleformer_ext.nn.linear import MOST_ROWS, Linear
from moduleformer_ext.nn.plain import Untouched, is_untouched
from moduleformer_ext.nn.quantised import QuantisedExpertLinear
from moduleformer_ext.nn.router import GateWeights, Router
from moduleformer_ext.ops.route_topk import centroid_rows
from moduleformer_ext.quantised import QuantisedMatrices
from moduleformer_ext.types import NormedRouter, RouteTopK, Segments

if TYPE_CHECKING:
    from moduleformer_ext.nn.block import Block

Past = LayerCache | StaticLayerCache
Routes = tuple[RouteTopK, RouteTopK]


def decode(
    block: Block, x: Tensor, past: Any, key_padding_mask: Tensor | None, output_routes: bool
) -> tuple[Tensor, Routes | None, Past] | None:
    """What the block makes of x [B, T, D] after a past: the new x, how attention and feed-forward experts were chosen
    if that is asked for, and the cache of past and new tokens. None where its modules must be called.
    """
    if not may_decode(x):
        return None
    weights = _WEIGHTS.get(block)
    if weights is None or not weights.untouched.holds():
        weights = weights_of(block)
        if weights is None:
            return None
        _WEIGHTS[block] = weights
    if not weights.serve(x, past):
        return None

    attention_step: Callable[..., Any] = ops.attention_layer_decode
    ffn_step: Callable[..., Any] = ops.ffn_layer_decode
    attention, ffn = weights.attention, weights.ffn
    present, lengths = (past, past.lengths) if isinstance(past, StaticLayerCache) else past.reserve(x.shape[1])
    x = attention_step(
        x,
        attention.input.router_of(x.dtype),
        *attention.matrices,
        present.keys,
        present.values,
        lengths,
        key_padding_mask=key_padding_mask,
        stick_epsilon=attention.module.stick_epsilon,
        return_route=output_routes,
    )
    if not output_routes:
        y = ffn_step(x, ffn.input.router_of(x.dtype), *ffn.matrices, activation=ffn.module.activation)
        return y, None, present
    x, attention_route = x
    y, ffn_route = ffn_step(
        x, ffn.input.router_of(x.dtype), *ffn.matrices, activation=ffn.module.activation, return_route=True
    )
    return y, (attention_route, ffn_route), present


def may_decode(x: Tensor) -> bool:
    """Whether these tokens, and the modes that torch is in, are for such ops."""
    if torch.is_grad_enabled() or type(x) is not Tensor or torch.compiler.is_compiling() or _has_any_global_hook():
        return False
    batch, length, _ = x.shape
    return batch * length <= MOST_ROWS and not torch.is_autocast_enabled(x.device.type)


class _Input(NamedTuple):
    """Norm and router before a layer."""

    norm: nn.LayerNorm
    weight: Tensor
    bias: Tensor
    router: Router
    gate: GateWeights

    def router_of(self, dtype: torch.dtype) -> NormedRouter:
        """As the ops take it for x of this type."""
        kind, hidden_weight, hidden_bias, rows, temperature = self.gate
        if temperature is not None:
            rows = centroid_rows(rows, temperature, torch.float64 if dtype == torch.float64 else torch.float32)
        k, order = self.router.k, self.router.order
        return NormedRouter(kind, hidden_weight, hidden_bias, rows, k, order, self.weight, self.bias, self.norm.eps)


class _Layer(NamedTuple):
    """A layer of a block: what is before it, the module, and its matrices as the op takes them."""

    input: _Input
    module: Any
    matrices: tuple[Segments | QuantisedMatrices | None, ...]


class Weights(NamedTuple):
    """What the ops take of a block, for as long as its modules are untouched."""

    untouched: Untouched
    attention: _Layer
    ffn: _Layer
    random: Sequence[nn.Module]
    """What draws random numbers in training."""

    def serve(self, x: Tensor, past: Any) -> bool:
        """Whether tokens x can be decoded after this past."""
        return (
            not any(map(TRAINING, self.random))
            and self.attention.input.weight.dtype is x.dtype
            and self.ffn.input.weight.dtype is x.dtype
            and serves(self.attention.module, x, past)
        )


def serves(attention: MixtureOfAttention, x: Tensor, past: Any) -> bool:
    """Whether the op of this layer takes tokens x after a past."""
    if isinstance(past, StaticLayerCache):
        if past.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False
    elif not isinstance(past, LayerCache) or past.is_unset:
        return False
    keys = past.keys
    batch, length, heads, head_dim = keys.shape
    return (
        length > 0
        and keys.dtype is x.dtype
        and (batch, heads, head_dim) == (x.shape[0], attention.n_head, attention.head_dim)
        and head_dim % HEAD_MULTIPLE == 0
        and (past.values is None) == attention.identity_kv
    )


TRAINING = attrgetter("training")
_WEIGHTS: WeakKeyDictionary[nn.Module, Weights] = WeakKeyDictionary()
"""Of blocks that were found plain. Not in the blocks, whose copies would have the weights of the others."""


# Below, None stands for what must be called. Parameters are read from their tables, which parametrised ones are not in.


def weights_of(block: Block) -> Weights | None:
    attention, ffn = _attention(block.ln_1, block.attn), _ffn(block.ln_2, block.mlpf)
    if attention is None or ffn is None or not is_untouched(block.resid_dropout, nn.Dropout):
        return None
    modules = [module for module in block.modules() if module is not block]
    random = [module for module in modules if isinstance(module, (nn.Dropout, Router))]
    return Weights(Untouched(modules, block), attention, ffn, random)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """None too for a tensor of another class: quantised, or distributed."""
    parameter = module._parameters.get(name)
    return parameter if type(parameter) is nn.Parameter else None


def _input(norm: nn.Module, router: nn.Module) -> _Input | None:
    if not isinstance(norm, nn.LayerNorm) or not is_untouched(norm, nn.LayerNorm):
        return None
    if not isinstance(router, Router) or not is_untouched(router, Router):
        return None
    weight, bias, gate = _parameter(norm, "weight"), _parameter(norm, "bias"), router.gate_weights()
    if weight is None or bias is None or gate is None:
        return None
    tensors = [part for part in pytree.tree_leaves(tuple(gate)) if isinstance(part, Tensor)]
    plain = all(type(tensor) is nn.Parameter for tensor in tensors)
    return _Input(norm, weight, bias, router, gate) if plain else None


def _matrices(experts: nn.Module) -> Segments | QuantisedMatrices | None:
    if isinstance(experts, QuantisedExpertLinear):
        plain = is_untouched(experts, QuantisedExpertLinear) and not experts._parameters
        return experts.weight if plain and {type(buffer) for buffer in experts.buffers()} == {Tensor} else None
    if not is_untouched(experts, ExpertLinear):
        return None
    names = [name for name, parameter in experts._parameters.items() if parameter is not None]
    segments = [segment for name in names if (segment := _parameter(experts, name)) is not None]
    if not segments or len(segments) < len(names):
        return None
    return segments[0] if len(segments) == 1 else segments


def _projection(linear: nn.Module, identity: bool) -> tuple[Tensor | None, Tensor | None] | None:
    if identity:
        return (None, None) if is_untouched(linear, nn.Identity) else None
    weight, bias = _parameter(linear, "weight"), _parameter(linear, "bias")
    if weight is None or not weight.is_contiguous() or not is_untouched(linear, Linear):
        return None
    has_none = linear._parameters.get("bias", weight) is None
    return (weight, bias) if bias is not None or has_none else None


def _attention(norm: nn.Module, attention: nn.Module) -> _Layer | None:
    if not isinstance(attention, MixtureOfAttention) or not is_untouched(attention, MixtureOfAttention):
        return None
    projection = attention.q_proj
    if not isinstance(projection, RoutedProjection) or not is_untouched(projection, RoutedProjection):
        return None
    first = _input(norm, projection.gate)
    queries, outputs = _matrices(projection.experts), _matrices(projection.output_experts)
    keys = _projection(attention.k_proj, attention.identity_kv)
    values = _projection(attention.v_proj, attention.identity_kv)
    if first is None or queries is None or outputs is None or keys is None or values is None:
        return None
    return _Layer(first, attention, (queries, outputs, *keys, *values))


def _ffn(norm: nn.Module, ffn: nn.Module) -> _Layer | None:
    if not isinstance(ffn, MixtureOfFFN) or not is_untouched(ffn, MixtureOfFFN):
        return None
    first, up, down = _input(norm, ffn.gate), _matrices(ffn.experts), _matrices(ffn.output_experts)
    return None if first is None or up is None or down is None else _Layer(first, ffn, (up, down))
