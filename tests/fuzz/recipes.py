"""Valid calls of every op, of random sizes, types and strides, to be compared with the reference or broken."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moduleformer_ext import ops, reference
from moduleformer_ext.ops._segments import segments
from moduleformer_ext.quantised import BITS, quantise
from moduleformer_ext.reference.grouped_gemm import ACTIVATIONS, GATED
from moduleformer_ext.types import BlockWeights, NormedRouter

RAW = torch.ops.moduleformer_ext
ORDERS = ("softmax_topk", "topk_softmax", "sigmoid_topk", "sigmoid_topk_renormalised")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Call:
    """A call of a public function or raw operator."""

    name: str
    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    twin: Callable[..., Any] | None = None
    """The plain-PyTorch function of the same signature."""
    differentiable: bool = False


def own_copy(t: Any) -> Any:
    """For a call that writes to it: in memory of its own, laid out as it was. Of a list every part."""
    if isinstance(t, list):
        return [own_copy(part) for part in t]
    if not isinstance(t, Tensor):
        return t
    copy = t.detach().new_empty(0).set_(t.untyped_storage().clone(), t.storage_offset(), t.shape, t.stride())
    return copy.requires_grad_(t.requires_grad)


class Maker:
    """Draws everything from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice(DTYPES)
        self.result_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32

    def size(self, *, least: int = 0) -> int:
        return max(least, self.random.choice((0, 1, 1, 2, 3, 5, 7, 17, 33)))

    def normal(self, *shape: int, dtype: torch.dtype | None = None, strided: bool = True, last: bool = False) -> Tensor:
        """``last``: the last dimension stays contiguous."""
        values = torch.randn(shape, generator=self.generator).to(dtype or self.dtype)
        return self.strided(values, last) if strided else values

    def strided(self, values: Tensor, last: bool = False) -> Tensor:
        """The same values in another layout."""
        style = self.random.choice(("plain", "plain", "permuted", "gapped", "offset"))
        if style == "permuted":
            order = list(range(values.dim() - last))
            self.random.shuffle(order)
            order += [values.dim() - 1] * last
            inverse = sorted(range(len(order)), key=order.__getitem__)
            return values.permute(order).contiguous().permute(inverse)
        if style == "gapped":
            space = values.new_zeros([n + self.random.randint(0, 3) for n in values.shape])
            view = space[tuple(slice(0, n) for n in values.shape)]
            return view.copy_(values)
        if style == "offset":
            offset = self.random.randint(1, 5)
            space = values.new_zeros(values.numel() + offset)
            return space[offset:].view(values.shape).copy_(values)
        return values

    def lengths(self, total: int, parts: int) -> list[int]:
        cuts = sorted(self.random.randint(0, total) for _ in range(parts - 1))
        return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]

    def segments(self, experts: int, *shape: int, **options: Any) -> list[Tensor]:
        parts = self.lengths(experts, self.random.randint(1, min(3, experts)))
        return [self.normal(n, *shape, **options) for n in parts]

    def matrices(self, experts: int, rows: int, columns: int) -> list[Tensor]:
        """Segments, in memory as they are or as their transposes."""
        if self.chance():
            return self.segments(experts, rows, columns)
        return [segment.transpose(1, 2) for segment in self.segments(experts, columns, rows)]

    def chance(self, probability: float = 0.5) -> bool:
        return self.random.random() < probability


def expert_layout(m: Maker) -> Call:
    experts = m.size(least=1)
    ids = torch.randint(experts, (m.size(), m.size(least=1)), generator=m.generator)
    ids = m.strided(ids if m.chance() else ids.int())
    return Call("expert_layout", ops.expert_layout, [ids, experts], twin=reference.expert_layout)


def linear_decode(m: Maker) -> Call:
    inner, outer = m.size(least=1), m.size()
    x = m.normal(*(m.size() for _ in range(m.random.randint(0, 2))), inner)
    bias = m.normal(outer) if m.chance() else None
    args = [x, m.normal(outer, inner, strided=False), bias]
    return Call("linear_decode", ops.linear_decode, args, twin=reference.linear_decode)


def linear_cross_entropy(m: Maker) -> Call:
    features, classes = m.size(least=1), m.size(least=1)
    leading = [m.size() for _ in range(m.random.randint(0, 2))]
    target = torch.randint(classes, leading, generator=m.generator)
    target = target.masked_fill(torch.rand(leading, generator=m.generator) < 0.2, -100)
    args = [m.normal(*leading, features), m.normal(classes, features), m.strided(target)]
    options = {"reduction": m.random.choice(("sum", "none")), "z_loss": m.random.choice((0.0, 0.1))}
    twin = reference.linear_cross_entropy
    return Call("linear_cross_entropy", ops.linear_cross_entropy, args, options, twin, differentiable=True)


def router(m: Maker, gate: str) -> Call:
    # At least 2 hidden features: in one dimension there are only two unit vectors, so that gmm experts would tie up to
    # rounding.
    tokens, dim, hidden, experts = m.size(), m.size(least=1), m.size(least=2), m.size(least=1)
    k = m.random.randint(1, min(4, experts))
    sampled = m.random.choice((0, 0, m.random.randint(0, k)))
    options = {"order": m.random.choice(ORDERS[:2] if sampled else ORDERS), "num_sampled": sampled}
    options["scale"] = m.random.choice((1.0, 2.5))
    if not sampled and m.chance():
        options["selection_bias"] = m.normal(experts)
    if not sampled and m.chance():
        options["num_groups"] = m.random.choice([n for n in range(1, experts + 1) if experts % n == 0])
        least = -(-k * options["num_groups"] // experts)
        options["top_groups"] = m.random.randint(least, options["num_groups"])
        options["scored_per_group"] = m.random.randint(1, 2)
    if sampled:
        options["noise"] = m.strided(torch.empty(tokens, experts).exponential_(generator=m.generator) + 1e-3)
    if gate == "logits":
        name, args = "route_topk", [m.normal(tokens, experts)]
    elif gate == "linear":
        name, args = "route_topk_linear", [m.normal(tokens, dim), m.segments(experts, dim)]
    elif gate == "mlp":
        name = "route_topk_mlp"
        args = [m.normal(tokens, dim), m.normal(hidden, dim), m.normal(hidden), m.segments(experts, hidden)]
    else:
        name = "route_topk_gmm"
        args = [m.normal(tokens, dim), m.normal(hidden, dim), m.segments(experts, hidden), m.normal(1, strided=False)]
    return Call(name, getattr(ops, name), [*args, k], options, getattr(reference, name), differentiable=True)


def routing(m: Maker) -> tuple[Any, int, int, int]:
    tokens, experts = m.size(), m.size(least=1)
    choices = m.random.randint(1, min(4, experts))
    ids = torch.rand(tokens, experts, generator=m.generator).argsort(1)[:, :choices]
    return reference.expert_layout(ids, experts), tokens, experts, choices


def grouped_gemm(m: Maker) -> Call:
    layout, tokens, experts, choices = routing(m)
    inner, outer = m.size(least=1), 2 * m.size(least=1)
    shapes = {"token": (tokens,), "slot": (tokens, choices), "expert": (tokens * choices,)}
    x_order, out_order = m.random.choice(list(shapes)), m.random.choice(list(shapes))
    options = {
        "x_order": x_order,
        "out_order": out_order,
        "activation": m.random.choice((None, None, *ACTIVATIONS)),
        "gates": None,
    }
    if out_order == "token" and m.chance():
        options["gates"] = m.normal(tokens, choices, dtype=m.result_dtype)
    if m.chance():
        options["bias"] = m.segments(experts, outer)
    args = [m.normal(*shapes[x_order], inner), m.matrices(experts, inner, outer), layout]
    return Call("grouped_gemm", ops.grouped_gemm, args, options, reference.grouped_gemm, differentiable=True)


def quantised_gemm(m: Maker) -> Call:
    layout, tokens, experts, choices = routing(m)
    inner, outer = m.size(least=1), m.random.choice((1, 7, 128))
    shapes = {"token": (tokens,), "slot": (tokens, choices), "expert": (tokens * choices,)}
    x_order, out_order = m.random.choice(list(shapes)), m.random.choice(list(shapes))
    options = {
        "x_order": x_order,
        "out_order": out_order,
        "activation": m.random.choice((None, None, *(ACTIVATIONS if outer == 128 else ()))),
        "gates": m.normal(tokens, choices, dtype=torch.float32) if out_order == "token" and m.chance() else None,
    }
    dtype = torch.float32 if m.dtype == torch.float64 else m.dtype
    matrices = torch.randn(experts, inner, outer, generator=m.generator)
    args = [m.normal(*shapes[x_order], inner, dtype=dtype), quantise(matrices, m.random.choice(BITS)), layout]
    return Call("quantised_gemm", ops.quantised_gemm, args, options, reference.quantised_gemm)


def expert_ffn(m: Maker) -> Call:
    layout, tokens, experts, choices = routing(m)
    dim, hidden = m.size(least=1), m.size(least=1)
    activation = m.random.choice(ACTIVATIONS)
    columns = 2 * hidden if activation in GATED else hidden
    args = [
        m.normal(tokens, dim),
        m.matrices(experts, dim, columns),
        m.matrices(experts, hidden, dim),
        layout,
        m.normal(tokens, choices, dtype=m.result_dtype),
    ]
    options: dict[str, Any] = {"activation": activation}
    if m.chance():
        options["up_bias"] = m.segments(experts, columns)
    if m.chance():
        options["down_bias"] = m.normal(experts, dim)
    return Call("expert_ffn", ops.expert_ffn, args, options, reference.expert_ffn, differentiable=True)


def attention_sizes(m: Maker) -> tuple[int, int, int]:
    return m.random.randint(1, 3), m.random.randint(1, 3), 8 * m.random.choice((1, 1, 2, 3, 8, 33))


def attention_options(m: Maker) -> dict[str, Any]:
    return {
        "scale": m.random.choice((None, 0.3, -0.1)),
        "attend_current": m.chance(0.7),
        "stick_epsilon": m.random.choice((None, 0.0, 1e-3)),
        "return_remainder": m.chance(),
    }


def stick_attention(m: Maker) -> Call:
    heads, group, dim = attention_sizes(m)
    query_heads = (heads, group) if m.chance() else (heads * group,)
    options = attention_options(m)
    if m.chance(0.3):
        counts = [m.size() for _ in range(m.random.randint(0, 3))]
        history = [m.size() if m.chance(0.3) else 0 for _ in counts]
        keys = [a + b for a, b in zip(counts, history, strict=True)]
        options["cu_seqlens_q"] = torch.tensor([0, *counts]).cumsum(0).int()
        options["cu_seqlens_k"] = torch.tensor([0, *keys]).cumsum(0).int()
        shape_q, shape_k = (sum(counts),), (sum(keys),)
    else:
        batch, queries = m.random.randint(0, 3), m.random.choice((0, 1, 2, 9, 70))
        keys = queries + m.random.choice((0, 0, 1, 64, 130))
        shape_q, shape_k = (batch, queries), (batch, keys)
        if m.chance(0.3):
            options["key_padding_mask"] = m.strided(torch.rand(batch, keys, generator=m.generator) < 0.7)
    args = [m.normal(*shape_q, *query_heads, dim), m.normal(*shape_k, heads, dim)]
    args.append(m.normal(*shape_k, heads, dim) if m.chance(0.7) else None)
    return Call("stick_attention", ops.stick_attention, args, options, reference.stick_attention, differentiable=True)


def stick_attention_decode(m: Maker) -> Call:
    heads, group, dim = attention_sizes(m)
    batch, new, keys = (
        m.random.randint(0, 3),
        m.random.choice((0, 1, 1, 2, 5)),
        m.size(least=1) * m.random.choice((1, 9)),
    )
    query_heads = (heads, group) if m.chance() else (heads * group,)
    args = [
        m.normal(batch, new, *query_heads, dim, last=True),
        m.normal(batch, keys, heads, dim, last=True),
        m.normal(batch, keys, heads, dim, last=True) if m.chance(0.7) else None,
        m.strided(torch.randint(0, keys + 1, (batch,), generator=m.generator).int()),
    ]
    options = attention_options(m)
    if m.chance(0.3):
        options["key_padding_mask"] = m.strided(torch.rand(batch, keys, generator=m.generator) < 0.7)
    name = "stick_attention_decode"
    return Call(name, ops.stick_attention_decode, args, options, reference.stick_attention_decode)


def layer_input(m: Maker, experts: int, dim: int) -> list[Any]:
    """What both ops of a layer's step take first."""
    # At least 2 hidden features, as in router().
    gate, hidden = m.random.choice(("linear", "mlp", "gmm")), m.size(least=2)
    x = m.normal(m.random.randint(0, 3), m.random.choice((0, 1, 1, 2, 5)), dim)
    router = NormedRouter(
        gate=gate,
        hidden_weight=None if gate == "linear" else m.normal(hidden, dim),
        hidden_bias=m.normal(hidden) if gate == "mlp" else None,
        gate_weight=m.segments(experts, dim if gate == "linear" else hidden),
        k=m.random.randint(1, min(4, experts)),
        order=m.random.choice(ORDERS),
        norm_weight=m.normal(dim),
        norm_bias=m.normal(dim),
        norm_epsilon=1e-5,
    )
    return [x, router]


def layer_matrices(m: Maker, experts: int, rows: int, columns: int, *, gated: bool = False) -> Any:
    """As both of these ops take them, quantised ones too."""
    if gated or m.dtype == torch.float64 or m.chance(0.6):
        return m.matrices(experts, rows, columns)
    return quantise(torch.randn(experts, rows, columns, generator=m.generator), m.random.choice(BITS))


CACHES = slice(8, 11)
"""What attention_layer_decode writes to."""


def both_overloads(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The step of a layer without its route and with it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        def own() -> list[Any]:
            return [*args[: CACHES.start], *map(own_copy, args[CACHES]), *args[CACHES.stop :]]

        return function(*own(), **kwargs, **options), function(*own(), **kwargs, **options, return_route=True)

    return call


def attention_layer_decode(m: Maker) -> Call:
    experts, heads, head_dim = m.size(least=1), m.random.randint(1, 3), 8 * m.random.choice((1, 1, 2, 3))
    width, shared = heads * head_dim, m.chance(0.3)
    dim = width if shared else m.size(least=1)
    first = layer_input(m, experts, dim)
    batch, new = first[0].shape[:2]
    keys = new + m.size()
    cache = [m.normal(batch, keys, heads, head_dim, last=True) for _ in range(2)]
    biases = [m.normal(width) if m.chance() and not shared else None for _ in range(2)]
    weights = [None if shared else m.normal(width, dim, strided=False) for _ in range(2)]
    args = [
        *first,
        layer_matrices(m, experts, dim, width),
        layer_matrices(m, experts, width, dim),
        weights[0],
        biases[0],
        weights[1],
        biases[1],
        cache[0],
        None if shared else cache[1],
        torch.randint(0, keys - new + 1, (batch,), generator=m.generator).int(),
    ]
    options: dict[str, Any] = {}
    if m.chance(0.3):
        options["key_padding_mask"] = m.strided(torch.rand(batch, keys, generator=m.generator) < 0.7)
    function, twin = (both_overloads(of.attention_layer_decode, stick_epsilon=0.0) for of in (ops, reference))
    return Call("attention_layer_decode", function, args, options, twin)


def ffn_layer_decode(m: Maker) -> Call:
    experts, dim, hidden = m.size(least=1), m.size(least=1), m.size(least=1)
    activation = m.random.choice(ACTIVATIONS)
    columns = 2 * hidden if activation in GATED else hidden
    args = [
        *layer_input(m, experts, dim),
        layer_matrices(m, experts, dim, columns, gated=activation in GATED),
        layer_matrices(m, experts, hidden, dim),
    ]
    function, twin = (both_overloads(of.ffn_layer_decode) for of in (ops, reference))
    return Call("ffn_layer_decode", function, args, {"activation": activation}, twin)


def blocks_decode(m: Maker) -> Call:
    blocks, caches = [], []
    first = attention_layer_decode(m)
    x, router = first.args[:2]
    dim, experts = x.shape[2], sum(len(rows) for rows in segments("recipe", "gate_weight", router.gate_weight))
    for _ in range(m.random.randint(1, 3)):
        matrices = [layer_matrices(m, experts, *shape) for shape in ((dim, 24), (24, dim))]
        blocks.append(BlockWeights(router, *first.args[2 : CACHES.start], router, *matrices))
        caches.append(own_copy(first.args[CACHES]))
    keys, values, lengths = (list(parts) for parts in zip(*caches, strict=True))
    args = [x, blocks, keys, None if values[0] is None else values, lengths]

    def changing_caches(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, blocks, *caches, **kwargs: function(x, blocks, *map(own_copy, caches), **kwargs)

    function, twin = (changing_caches(partial(of.blocks_decode, stick_epsilon=0.0)) for of in (ops, reference))
    return Call("blocks_decode", function, args, first.kwargs, twin)


PUBLIC: dict[str, Callable[[Maker], Call]] = {
    "attention_layer_decode": attention_layer_decode,
    "blocks_decode": blocks_decode,
    "expert_ffn": expert_ffn,
    "expert_layout": expert_layout,
    "ffn_layer_decode": ffn_layer_decode,
    "grouped_gemm": grouped_gemm,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_decode": linear_decode,
    "quantised_gemm": quantised_gemm,
    "route_topk": lambda m: router(m, "logits"),
    "route_topk_gmm": lambda m: router(m, "gmm"),
    "route_topk_linear": lambda m: router(m, "linear"),
    "route_topk_mlp": lambda m: router(m, "mlp"),
    "stick_attention": stick_attention,
    "stick_attention_decode": stick_attention_decode,
}
