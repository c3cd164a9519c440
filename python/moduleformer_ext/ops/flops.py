"""How many floating-point operations the ops take, for :class:`torch.utils.flop_counter.FlopCounterMode`.

As torch counts its own operators: matrix products alone, a multiplication and an addition being two operations, and for
attention the whole rectangle of queries and keys. Causal kernels do about half of that, and those of stick-breaking
attention less where sticks end early. A backward pass counts the products that the wanted gradients need; where only
some segments of a parameter want one, slots are taken to be spread evenly over the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

_OPS = torch.ops.moduleformer_ext

Shape = Sequence[int]


def _share(segments: Sequence[Shape], wanted: Sequence[bool]) -> float:
    """Of the experts in segments whose gradient is wanted."""
    experts = sum(segment[0] for segment in segments)
    return sum(segment[0] for segment, wants in zip(segments, wanted, strict=True) if wants) / max(experts, 1)


def _named(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names in the op's schema, for ops that have many."""
    names = [argument.name for argument in op.default._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _has_values(tensor: Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


@register_flop_formula(_OPS.quantised_gemm)
def _quantised_gemm(
    x: Shape,
    values: Shape,
    scales: Shape,
    bits: int,
    in_features: int,
    out_features: int,
    offsets: Shape,
    slot_order: Shape,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * slot_order[0] * in_features * out_features


@register_flop_formula(_OPS.linear_decode)
def _linear_decode(x: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(x[:-1]) * prod(weight)


def _saves_gradients(x: Tensor, reduction: str) -> bool:
    """Whether the forward pass of linear_cross_entropy makes the gradients."""
    return reduction != "none" and x.dtype != torch.float16


@register_flop_formula([_OPS.linear_cross_entropy, _OPS.linear_cross_entropy_forward], get_raw=True)
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    needs_x: bool = False,
    needs_weight: bool = False,
    **kwargs: Any,
) -> int:
    gradients = needs_x + needs_weight if _saves_gradients(x, reduction) else 0
    return 2 * prod(target.shape) * prod(weight.shape) * (1 + gradients)


@register_flop_formula(_OPS.linear_cross_entropy_backward, get_raw=True)
def _linear_cross_entropy_backward(*args: Any, **kwargs: Any) -> int:
    call = _named(_OPS.linear_cross_entropy_backward, args, kwargs)
    if _saves_gradients(call["x"], call["reduction"]):
        return 0
    return 2 * prod(call["target"].shape) * prod(call["weight"].shape) * (1 + call["needs_x"] + call["needs_weight"])


@register_flop_formula([_OPS.route_topk, _OPS.route_topk_forward])
def _route_topk(
    x: Shape,
    gate: str,
    hidden_weight: Shape | None,
    hidden_bias: Shape | None,
    weight: Sequence[Shape],
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * x[0] * (prod(hidden_weight or [0]) + sum(map(prod, weight)))


@register_flop_formula(_OPS.route_topk_backward)
def _route_topk_backward(*args: Any, **kwargs: Any) -> int:
    call = _named(_OPS.route_topk_backward, args, kwargs)
    x, hidden_weight, weight = call["x"], call["hidden_weight"], call["weight"]
    wants_x, wants_hidden_weight, wants_hidden_bias, *wants_weight = call["wanted"]
    experts = sum(map(prod, weight))
    to_weight = _share(weight, wants_weight) * experts
    if hidden_weight is None:
        return int(2 * x[0] * (wants_x * experts + to_weight))
    hidden = prod(hidden_weight)
    to_hidden_layer = (wants_x or wants_hidden_weight or wants_hidden_bias) * experts
    return int(2 * x[0] * (to_hidden_layer + to_weight + (wants_x + wants_hidden_weight) * hidden))


@register_flop_formula([_OPS.grouped_gemm, _OPS.grouped_gemm_forward])
def _grouped_gemm(
    x: Shape, weight: Sequence[Shape], offsets: Shape, slot_order: Shape, *args: Any, **kwargs: Any
) -> int:
    return 2 * slot_order[0] * prod(weight[0][1:])


@register_flop_formula(_OPS.grouped_gemm_backward)
def _grouped_gemm_backward(*args: Any, **kwargs: Any) -> int:
    call = _named(_OPS.grouped_gemm_backward, args, kwargs)
    weight, wants_x = call["weight"], call["needs_x"]
    # Behind an activation the gradient of the gates comes from what was saved, else from x and its gradient.
    through_weight = wants_x or (call["needs_gates"] and call["gates"] is not None and call["activation"] is None)
    slots = call["slot_order"][0]
    return int(2 * slots * prod(weight[0][1:]) * (through_weight + _share(weight, call["needs_weight"])))


@register_flop_formula([_OPS.expert_ffn, _OPS.expert_ffn_forward])
def _expert_ffn(
    x: Shape, up: Sequence[Shape], down: Sequence[Shape], offsets: Shape, slot_order: Shape, *args: Any, **kwargs: Any
) -> int:
    return 2 * slot_order[0] * (prod(up[0][1:]) + prod(down[0][1:]))


@register_flop_formula(_OPS.expert_ffn_backward)
def _expert_ffn_backward(*args: Any, **kwargs: Any) -> int:
    call = _named(_OPS.expert_ffn_backward, args, kwargs)
    up, down, wants_x = call["up"], call["down"], call["needs_x"]
    of_up, of_down = prod(up[0][1:]), prod(down[0][1:])
    to_hidden = wants_x or call["needs_gates"] or any(call["needs_up"])
    through_down = of_down * (to_hidden + _share(down, call["needs_down"]))
    return int(2 * call["slot_order"][0] * (through_down + of_up * (wants_x + _share(up, call["needs_up"]))))


def _pairs(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> int:
    """Queries times keys of one head, over all sequences."""
    if cu_seqlens_q is None:
        return q.shape[0] * q.shape[1] * k.shape[1]
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if not _has_values(cu_seqlens_q):  # at most
        return q.shape[0] * k.shape[0]
    return int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff()).sum())


def _heads_and_dim(q: Tensor, packed: bool) -> int:
    return prod(q.shape[1 if packed else 2 :])


@register_flop_formula(_OPS.stick_attention_forward, get_raw=True)
def _stick_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: Any,
    attend_current: Any,
    mask: Any,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * 2 * _pairs(q, k, cu_seqlens_q, cu_seqlens_k) * _heads_and_dim(q, cu_seqlens_q is not None)


@register_flop_formula(_OPS.stick_attention_backward, get_raw=True)
def _stick_attention_backward(*args: Any, **kwargs: Any) -> int:
    call = _named(_OPS.stick_attention_backward, args, kwargs)
    q, cu_seqlens_q = call["q"], call.get("cu_seqlens_q")
    # Scores and weights once more, and the gradients of weights, v, q and k.
    pairs = _pairs(q, call["k"], cu_seqlens_q, call.get("cu_seqlens_k"))
    return 2 * 5 * pairs * _heads_and_dim(q, cu_seqlens_q is not None)


def _cached_keys(cache: Tensor, lengths: Tensor) -> int:
    """Of all sequences; at most, where lengths have no values."""
    return int(lengths.sum()) if _has_values(lengths) else prod(cache.shape[:2])


@register_flop_formula(_OPS.stick_attention_decode, get_raw=True)
def _stick_attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, cache_lengths: Tensor, *args: Any, **kwargs: Any
) -> int:
    return 2 * 2 * _cached_keys(k_cache, cache_lengths) * prod(q.shape[1:])


def _gate(call: dict[str, Any], tokens: int) -> int:
    experts = sum(rows.shape[0] for rows in call["gate_weight"])
    hidden = call["hidden_weight"]
    return 2 * tokens * ((0 if hidden is None else hidden.numel()) + experts * call["gate_weight"][0].shape[1])


@register_flop_formula(_OPS.attention_layer_decode, get_raw=True)
def _attention_layer_decode(*args: Any, **kwargs: Any) -> int:
    return _attention(_named(_OPS.attention_layer_decode, args, kwargs))


def _attention(call: dict[str, Any]) -> int:
    batch, length, dim = call["x"].shape
    cache, lengths, tokens, k = call["k_cache"], call["cache_lengths"], batch * length, call["k"]
    width = prod(cache.shape[2:])
    projections = 0 if call["k_weight"] is None else 2 * 2 * tokens * dim * width
    # Counted after the call, when lengths have grown.
    attention = 2 * 2 * _cached_keys(cache, lengths) * length * k * width
    return int(_gate(call, tokens) + 2 * 2 * tokens * k * dim * width + projections + attention)


def _matrix_size(tensors: Sequence[Tensor], quantised_format: Sequence[int]) -> int:
    """Elements of an expert's matrix."""
    if quantised_format:
        _, in_features, out_features = quantised_format
        return in_features * out_features
    return prod(tensors[0].shape[1:])


@register_flop_formula(_OPS.ffn_layer_decode, get_raw=True)
def _ffn_layer_decode(*args: Any, **kwargs: Any) -> int:
    call = _named(_OPS.ffn_layer_decode, args, kwargs)
    return _ffn(call, [call["up_format"], call["down_format"]])


def _ffn(call: dict[str, Any], formats: Sequence[Sequence[int]]) -> int:
    tokens = prod(call["x"].shape[:2])
    matrices = sum(_matrix_size(call[name], own) for name, own in zip(("up", "down"), formats, strict=True))
    return int(_gate(call, tokens) + 2 * tokens * call["k"] * matrices)


_BLOCK = (
    *(f"attention.{name}" for name in ("hidden_weight", "hidden_bias", "gate_weight", "norm_weight", "norm_bias")),
    *("query_weight", "output_weight", "k_weight", "k_bias", "v_weight", "v_bias"),
    *(f"ffn.{name}" for name in ("hidden_weight", "hidden_bias", "gate_weight", "norm_weight", "norm_bias")),
    *("up", "down"),
)
"""The fields of a block in the order of blocks_decode's sizes."""


@register_flop_formula(_OPS.blocks_decode, get_raw=True)
def _blocks_decode(*args: Any, **kwargs: Any) -> int:
    call = _named(_OPS.blocks_decode, args, kwargs)
    tensors, sizes = iter(call["tensors"]), iter(call["sizes"])
    formats, total = call["formats"], 0
    for i, (cache, lengths) in enumerate(zip(call["k_caches"], call["cache_lengths"], strict=True)):
        fields = {name: list(islice(tensors, next(sizes))) for name in _BLOCK}
        own = [formats[at : at + 3] for at in range(12 * i, 12 * (i + 1), 3)]
        quantised = [numbers if any(numbers) else [] for numbers in own]

        def half(name: str, fields: dict[str, list[Tensor]] = fields) -> dict[str, Any]:
            hidden = fields[f"{name}.hidden_weight"]
            return {
                "x": call["x"],
                "k": call[f"{name}_k"],
                "hidden_weight": hidden[0] if hidden else None,
                "gate_weight": fields[f"{name}.gate_weight"],
            }

        attention = {"k_weight": fields["k_weight"] or None, "k_cache": cache, "cache_lengths": lengths}
        total += _attention(half("attention") | attention)
        total += _ffn(half("ffn") | {"up": fields["up"], "down": fields["down"]}, quantised[2:])
    return total
