"""Arguments of the ops that decode layers and blocks. Caches are NaN wherever no key was written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moduleformer_ext import ops
from moduleformer_ext.quantised import QuantisedMatrices, quantise
from moduleformer_ext.types import BlockWeights, NormedRouter, Segments

GATES = ("linear", "mlp", "gmm")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FEATURES, HIDDEN, EXPERTS = 32, 24, 5


class Maker:
    """Random tensors of one type from one seed."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale).to(self.dtype)

    def matrices(self, rows: int, columns: int, segments: int) -> Segments:
        """[EXPERTS, rows, columns], in so many parts."""
        whole = self.normal(EXPERTS, rows, columns, scale=rows**-0.5)
        return whole if segments == 1 else list(whole.tensor_split(segments))

    def input(self, batch: int, new: int, gate: str, k: int, order: str, segments: int) -> dict[str, Any]:
        """What both ops take first."""
        inner = FEATURES if gate == "linear" else HIDDEN
        rows = self.normal(EXPERTS, inner, scale=3 * inner**-0.5)
        x = self.normal(batch, new, FEATURES)
        router = NormedRouter(
            gate=gate,
            hidden_weight=None if gate == "linear" else self.normal(HIDDEN, FEATURES, scale=FEATURES**-0.5),
            hidden_bias=self.normal(HIDDEN) if gate == "mlp" else None,
            gate_weight=rows if segments == 1 else list(rows.tensor_split(segments)),
            k=k,
            order=order,
            norm_weight=1 + self.normal(FEATURES, scale=0.1),
            norm_bias=self.normal(FEATURES, scale=0.1),
            norm_epsilon=1e-5,
        )
        return {"x": x, "router": router}


def attention_case(
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    new: int = 1,
    gate: str = "mlp",
    k: int = 2,
    order: str = "softmax_topk",
    heads: int = 2,
    head_dim: int = 16,
    cache: int = 40,
    lengths: list[int] | None = None,
    shared: bool = False,
    bias: bool = True,
    segments: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """``shared``: keys and values are the tokens."""
    make, width = Maker(dtype, seed), heads * head_dim
    arguments = make.input(batch, new, gate, k, order, segments)
    arguments["query_weight"] = make.matrices(FEATURES, width, segments)
    arguments["output_weight"] = make.matrices(width, FEATURES, segments)
    for name in "kv":
        arguments[f"{name}_weight"] = None if shared else make.normal(width, FEATURES, scale=FEATURES**-0.5)
        arguments[f"{name}_bias"] = make.normal(width) if bias and not shared else None
    filled = torch.tensor([3 + 4 * b for b in range(batch)] if lengths is None else lengths, dtype=torch.int32)
    for name in "kv":
        stored = make.normal(batch, cache, heads, head_dim)
        for b, length in enumerate(filled.tolist()):
            stored[b, length:] = torch.nan
        arguments[f"{name}_cache"] = None if shared and name == "v" else stored
    arguments["cache_lengths"] = filled
    return arguments


def ffn_case(
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    new: int = 1,
    gate: str = "mlp",
    k: int = 2,
    order: str = "softmax_topk",
    activation: str = "gelu_tanh",
    segments: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    make = Maker(dtype, seed)
    columns = 80 if activation in ("swiglu", "geglu") else 40
    return {
        **make.input(batch, new, gate, k, order, segments),
        "up": make.matrices(FEATURES, columns, segments),
        "down": make.matrices(40, FEATURES, segments),
        "activation": activation,
    }


MATRICES = ("query_weight", "output_weight", "up", "down")


def quantised(arguments: dict[str, Any], bits: int, names: Sequence[str] = MATRICES) -> dict[str, Any]:
    """With quantised matrices of experts."""
    return {key: quantise(value, bits) if key in names else value for key, value in arguments.items()}


def changed(arguments: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With other arguments, or other fields of the router."""
    fields = {name: value for name, value in changes.items() if name in NormedRouter._fields}
    others = {name: value for name, value in changes.items() if name not in fields}
    return {**arguments, "router": arguments["router"]._replace(**fields), **others}


def copied(arguments: dict[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
    """For a call that changes its caches."""
    return pytree.tree_map_only(Tensor, lambda t: t.clone().to(device), arguments)


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """In float64, quantised matrices as they are."""
    return pytree.tree_map_only(
        (Tensor, QuantisedMatrices),
        lambda t: (
            t.double() if torch.is_tensor(t) and t.is_floating_point() else pytree.tree_map_only(Tensor, torch.clone, t)
        ),
        arguments,
        is_leaf=lambda t: isinstance(t, QuantisedMatrices),
    )


def stack_case(layers: int = 3, bits: int | None = None, **options: Any) -> dict[str, Any]:
    """x, blocks and their caches as keyword arguments of the op."""
    attentions = [attention_case(seed=i, **options) for i in range(layers)]
    shared = {"dtype", "batch", "new", "gate", "k", "order", "segments"}
    ffns = [ffn_case(seed=9 + i, **{k: v for k, v in options.items() if k in shared}) for i in range(layers)]
    x = attentions[0]["x"]
    if bits is not None:
        attentions, ffns = ([quantised(case, bits) for case in cases] for cases in (attentions, ffns))
    blocks = [
        BlockWeights(
            a["router"],
            *(a[name] for name in ("query_weight", "output_weight", "k_weight", "k_bias", "v_weight", "v_bias")),
            *(f[name] for name in ("router", "up", "down", "activation")),
        )
        for a, f in zip(attentions, ffns, strict=True)
    ]
    values = None if attentions[0]["v_cache"] is None else [a["v_cache"] for a in attentions]
    return {
        "x": x,
        "blocks": blocks,
        "k_caches": [a["k_cache"] for a in attentions],
        "v_caches": values,
        "cache_lengths": [a["cache_lengths"] for a in attentions],
    }


def by_halves(
    x: Tensor,
    blocks: Sequence[BlockWeights],
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor] | None,
    cache_lengths: Sequence[Tensor],
    **options: Any,
) -> Tensor:
    """What blocks_decode stands for."""
    for i, block in enumerate(blocks):
        first, *attention, second, up, down, activation = block
        values = None if v_caches is None else v_caches[i]
        x = ops.attention_layer_decode(x, first, *attention, k_caches[i], values, cache_lengths[i], **options)
        x = ops.ffn_layer_decode(x, second, up, down, activation=activation)
    return x


def assert_same_caches(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("k_caches", "v_caches", "cache_lengths"):
        for a, b in zip(one[name] or (), other[name] or (), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)
