"""Calls of the ops by name, on whole tensors and on DTensors, for tests that compare the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from moduleformer_ext import ops
from moduleformer_ext.types import ExpertLayout, RouteTopK

Values = dict[str, Tensor]


class Found(NamedTuple):
    """What a call gave, whole."""

    results: list[Tensor]
    gradients: dict[str, Tensor]
    placements: list[str]
    """Of the results; of plain tensors none."""
    gradient_placements: dict[str, str]
    collectives: tuple[int, int]
    """Forward and backward."""


@dataclass(frozen=True)
class Call:
    values: Callable[[], Values]
    run: Callable[..., Sequence[Tensor]]


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# ---- Attention ----


def _heads(query: Sequence[int], key: Sequence[int], *, v: bool = True, **others: Tensor) -> Callable[[], Values]:
    values = {"q": _randn(*query, seed=1), "k": _randn(*key, seed=2)}
    if v:
        values["v"] = _randn(*key, seed=3)
    return lambda: {**values, **others}


def _attend(dtype: torch.dtype = torch.float64, **options: Any) -> Callable[..., Sequence[Tensor]]:
    def run(q: Tensor, k: Tensor, v: Tensor | None = None, **others: Tensor) -> Sequence[Tensor]:
        q, k, v = q.to(dtype), k.to(dtype), v if v is None else v.to(dtype)
        return ops.stick_attention(q, k, v, return_remainder=True, **options, **others)

    return run


def _decode(q: Tensor, k: Tensor, v: Tensor | None = None, **others: Tensor) -> Sequence[Tensor]:
    with torch.no_grad():
        return ops.stick_attention_decode(q, k, v, return_remainder=True, **others)


_MASK = torch.arange(4 * 9).reshape(4, 9) % 5 > 0
_LENGTHS = torch.tensor([9, 4, 0, 7], dtype=torch.int32)
_CU_Q = torch.tensor([0, 2, 2, 5, 6, 6, 9, 12], dtype=torch.int32)
_CU_K = torch.tensor([0, 4, 4, 7, 8, 8, 13, 16], dtype=torch.int32)

# ---- Router ----


def _route(gate: str, **options: Any) -> Callable[..., Sequence[Tensor]]:
    function = getattr(ops, gate)

    def run(**values: Tensor) -> RouteTopK:
        chooses = {name: values.pop(name) for name in ("noise", "selection_bias") if name in values}
        if "old" in values:
            values["weight"] = [values.pop("old"), values.pop("new")]
        return function(*values.values(), k=2, **chooses, **options)

    return run


def _rows(x: tuple[int, int], *weights: tuple[int, ...], **others: Tensor) -> Callable[[], Values]:
    return lambda: {
        "x": _randn(*x),
        **{f"w{i}": _randn(*shape, seed=i + 1) for i, shape in enumerate(weights)},
        **others,
    }


# ---- Experts ----

TOKENS, CHOICES, EXPERTS = 7, 2, 5
_IDS = torch.tensor([[0, 3], [3, 1], [3, 0], [1, 3], [0, 1], [3, 1], [1, 0]], dtype=torch.int32)


def _layout(values: Values) -> ExpertLayout:
    return ops.expert_layout(values.pop("ids"), EXPERTS)


def _gemm(**options: Any) -> Callable[..., Sequence[Tensor]]:
    def run(**values: Tensor) -> Sequence[Tensor]:
        layout, x = _layout(values), values.pop("x")
        weight = [values.pop(name) for name in list(values) if name.startswith("weight")]
        return [ops.grouped_gemm(x, weight, layout, **values, **options)]

    return run


def _ffn(**options: Any) -> Callable[..., Sequence[Tensor]]:
    def run(**values: Tensor) -> Sequence[Tensor]:
        layout, x, gates = _layout(values), values.pop("x"), values.pop("gates")
        up = [values.pop(name) for name in list(values) if name in ("up0", "up1")]
        down = [values.pop(name) for name in list(values) if name in ("down0", "down1")]
        return [ops.expert_ffn(x, up, down, layout, gates, **values, **options)]

    return run


def _gemm_values(*x: int, segments: Sequence[int] = (EXPERTS,), gated: bool = False) -> Callable[[], Values]:
    values = {"ids": _IDS, "x": _randn(*x)}
    values |= {f"weight{i}": _randn(size, 6, 8, seed=i + 1) for i, size in enumerate(segments)}
    return lambda: {**values, "gates": _rand(TOKENS, CHOICES)} if gated else values


def _ffn_values(segments: Sequence[int] = (EXPERTS,), columns: int = 8) -> Callable[[], Values]:
    values = {"ids": _IDS, "x": _randn(TOKENS, 6), "gates": _rand(TOKENS, CHOICES)}
    for i, size in enumerate(segments):
        values |= {f"up{i}": _randn(size, 6, columns, seed=i + 1), f"down{i}": _randn(size, 8, 6, seed=i + 11)}
    return lambda: values


_TOKEN, _SLOT, _EXPERT = (TOKENS, 6), (TOKENS, CHOICES, 6), (TOKENS * CHOICES, 6)

CALLS: Mapping[str, Call] = {
    "attention": Call(_heads((4, 9, 6, 16), (4, 9, 2, 16)), _attend()),
    "attention of padded keys": Call(_heads((4, 5, 2, 3, 16), (4, 9, 2, 16), key_padding_mask=_MASK), _attend()),
    "attention where k is v": Call(_heads((4, 9, 1, 4, 16), (4, 9, 1, 16), v=False), _attend()),
    "attention with one key head": Call(_heads((4, 9, 4, 16), (4, 9, 1, 16)), _attend()),
    "attention in bfloat16": Call(_heads((4, 9, 6, 16), (4, 9, 2, 16)), _attend(torch.bfloat16)),
    "packed attention": Call(_heads((12, 6, 16), (12, 2, 16), cu_seqlens_q=_CU_Q), _attend()),
    "packed attention with a past": Call(
        _heads((12, 2, 3, 16), (16, 2, 16), cu_seqlens_q=_CU_Q, cu_seqlens_k=_CU_K), _attend(scale=0.3)
    ),
    "decode": Call(_heads((4, 2, 6, 16), (4, 9, 2, 16), cache_lengths=_LENGTHS), _decode),
    "decode where k is v": Call(
        _heads((4, 2, 1, 4, 16), (4, 9, 1, 16), v=False, cache_lengths=_LENGTHS, key_padding_mask=_MASK), _decode
    ),
    "route_topk": Call(_rows((7, EXPERTS)), _route("route_topk")),
    "route_topk by score": Call(
        _rows((7, EXPERTS), selection_bias=_rand(EXPERTS)),
        _route("route_topk", order="sigmoid_topk_renormalised", num_groups=EXPERTS, top_groups=3, scale=2.0),
    ),
    "route_topk_linear": Call(
        _rows((7, 6), (EXPERTS, 6), noise=_rand(7, EXPERTS)), _route("route_topk_linear", num_sampled=1)
    ),
    "route_topk_mlp": Call(
        lambda: {
            **_rows((7, 6), (8, 6), (8,))(),
            "old": _randn(2, 8, seed=7),
            "new": _randn(3, 8, seed=8),
        },
        _route("route_topk_mlp", order="topk_softmax"),
    ),
    "route_topk_gmm": Call(_rows((7, 6), (8, 6), (EXPERTS, 8), (1,)), _route("route_topk_gmm")),
    "expert_layout": Call(lambda: {"ids": _IDS}, lambda ids: ops.expert_layout(ids, EXPERTS)[:4]),
    "gemm": Call(_gemm_values(*_TOKEN), _gemm(out_order="slot")),
    "gemm with gates": Call(
        _gemm_values(*_SLOT, segments=(2, 3), gated=True), _gemm(x_order="slot", out_order="token")
    ),
    "gemm in expert order": Call(_gemm_values(*_TOKEN), _gemm()),
    "gemm from expert order": Call(_gemm_values(*_EXPERT), _gemm(x_order="expert", out_order="token")),
    "gemm with activation": Call(_gemm_values(*_TOKEN), _gemm(out_order="token", activation="silu")),
    "gemm with a gated activation": Call(_gemm_values(*_TOKEN), _gemm(activation="swiglu")),
    "gemm with a bias": Call(
        lambda: {**_gemm_values(*_TOKEN, gated=True)(), "bias": _randn(EXPERTS, 8, seed=9)}, _gemm(out_order="token")
    ),
    "ffn": Call(_ffn_values(), _ffn()),
    "ffn with biases": Call(
        lambda: {
            **_ffn_values((2, 3))(),
            "bias_up": _randn(EXPERTS, 8, seed=8),
            "bias_down": _randn(EXPERTS, 6, seed=9),
        },
        lambda bias_up, bias_down, **values: _ffn()(up_bias=bias_up, down_bias=bias_down, **values),
    ),
    "ffn of segments": Call(_ffn_values((1, 4)), _ffn(activation="relu")),
    "ffn with a gated activation": Call(_ffn_values(columns=16), _ffn(activation="geglu")),
    **{
        f"loss, {reduction}": Call(
            lambda: {
                "x": _randn(3, 5, 6),
                "weight": _randn(8, 6, seed=1),
                "target": torch.arange(15).reshape(3, 5) % 9 - (torch.arange(15).reshape(3, 5) % 9 == 8) * 108,
            },
            lambda reduction=reduction, **values: [ops.linear_cross_entropy(**values, reduction=reduction)],
        )
        for reduction in ("mean", "sum", "none")
    },
    "linear_decode": Call(
        lambda: {"x": _randn(3, 5, 6), "weight": _randn(8, 6, seed=1), "bias": _randn(8, seed=2)},
        lambda **values: [_no_grad(ops.linear_decode, **values)],
    ),
}


def _no_grad(function: Callable[..., Any], **values: Tensor) -> Any:
    with torch.no_grad():
        return function(**values)


def placements(text: str) -> list[Placement]:
    """One for each mesh dimension: S and a dimension, R, P."""
    kinds = {"R": Replicate(), "P": Partial()}
    return [kinds.get(one) or Shard(int(one[1:])) for one in text.split()]


def _text(tensor: Tensor) -> str:
    if not isinstance(tensor, DTensor):
        return ""
    return " ".join(f"S{p.dim}" if isinstance(p, Shard) else type(p).__name__[0] for p in tensor.placements)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compute(name: str, place: Mapping[str, str] | None = None, mesh: Sequence[int] = (2,)) -> Found:
    """The call's results and gradients; place: where its arguments are, by name (others: everywhere)."""
    call = CALLS[name]
    values = call.values()
    of = None if place is None else init_device_mesh("cpu", tuple(mesh))
    if of is not None:
        assert place.keys() <= values.keys()
        replicated = " ".join("R" * of.ndim)
        values = {
            name: distribute_tensor(value, of, placements(place.get(name, replicated)))
            for name, value in values.items()
        }
    leaves = {name: value.requires_grad_() for name, value in values.items() if value.is_floating_point()}
    with CommDebugMode() as forward:
        results = list(call.run(**values))
    backward = CommDebugMode()
    gradients: dict[str, Tensor] = {}
    outputs = [result for result in results if result.requires_grad]
    if outputs:
        grads = [_randn(*output.shape, seed=50 + i, dtype=output.dtype) for i, output in enumerate(outputs)]
        if of is not None:
            grads = [
                distribute_tensor(grad, of, [Replicate() if isinstance(p, Partial) else p for p in output.placements])
                for grad, output in zip(grads, outputs, strict=True)
            ]
        with backward:
            found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
        gradients = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
    return Found(
        [_whole(result.detach()) for result in results],
        {name: _whole(grad) for name, grad in gradients.items()},
        [_text(result) for result in results],
        {name: _text(grad) for name, grad in gradients.items()},
        (forward.get_total_counts(), backward.get_total_counts()),
    )
