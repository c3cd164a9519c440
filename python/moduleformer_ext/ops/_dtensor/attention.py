"""Stick-breaking attention for DTensors: sequences or heads can be spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard

from moduleformer_ext.ops._dtensor.strategies import Arguments, Backward, Plan, Rule, Strategy, is_traced

_OP = "stick_attention"
_PACKED = "packed sequences"


def _by_heads(q: Tensor, keys: Tensor, names: Sequence[str], results: Callable[[Shard], Any]) -> list[Strategy]:
    """K/V heads with their query heads, or query heads alone where they are a dimension of their own."""
    dim = keys.dim() - 2
    shard = Shard(dim)
    found = [Strategy("heads", dict.fromkeys(names, shard), results(shard), divides=keys.shape[dim])]
    if q.dim() > keys.dim() or keys.shape[dim] == 1:
        shard = Shard(q.dim() - 2)
        found.append(Strategy("query heads", {"q": shard}, results(shard), divides=q.shape[-2]))
    return found


def _strategies(a: Arguments) -> list[Strategy]:
    q, k = a["q"], a["k"]
    rounded = q.dtype in (torch.float16, torch.bfloat16) and a.get("for_backward", True)

    def results(shard: Shard) -> list[Placement]:
        return [shard, shard, shard if rounded else Replicate(), shard]  # o, remainder, residual, first_tiles

    name = "sequences" if a["cu_seqlens_q"] is None else _PACKED
    rows = dict.fromkeys(("q", "k", "v", "key_padding_mask"), Shard(0))
    return [Strategy(name, rows, results(Shard(0))), *_by_heads(q, k, ("q", "k", "v"), results)]


def _compute(function: Callable[..., Any], local: Arguments, plan: Plan) -> Any:
    if plan.uses(_PACKED):
        local |= _own_sequences(local, plan)
    return function(*local.values())


def _own_sequences(local: Arguments, plan: Plan) -> Arguments:
    """cu_seqlens of this process's tokens: those of other processes' sequences become empty."""
    cu = {name: each for name in "qk" if (each := local[f"cu_seqlens_{name}"]) is not None}
    if any(is_traced(each) for each in cu.values()):
        raise NotImplementedError(
            f"{_OP}: q must not be sharded by tokens under torch.compile and torch.export, which cannot see where "
            "cu_seqlens_q lies; shard heads, or leave the op out of what is compiled"
        )
    cuts = torch.stack([torch.tensor(plan.boundaries(name)) for name in cu])
    ends = torch.stack([each.cpu() for each in cu.values()])
    if (ends.diff() < 0).any():  # the op says so, everywhere
        return {}
    whole = (ends[:, :, None] == cuts[:, None, :]).all(0).any(0)
    if not whole.all():
        raise ValueError(
            f"{_OP}: {' and '.join(cu)} must be sharded between sequences, got processes whose tokens begin at "
            f"{cuts[:, ~whole].T.tolist()} and sequences that begin at {ends.T.tolist()}; redistribute to Replicate or "
            "shard heads"
        )
    return {
        f"cu_seqlens_{name}": (each - start).clamp(0, length)
        for name, each in cu.items()
        for start, length in [plan.part(name)]
    }


def _decode_strategies(a: Arguments) -> list[Strategy]:
    shard = Shard(0)
    names = ("q", "k_cache", "v_cache", "cache_lengths", "key_padding_mask")
    sequences = Strategy("sequences", dict.fromkeys(names, shard), [shard, shard])
    return [sequences, *_by_heads(a["q"], a["k_cache"], ("q", "k_cache", "v_cache"), lambda shard: [shard, shard])]


_BACKWARD = Backward(
    {"grad_o": 0, "grad_remainder": 1},
    {"o": 0, "remainder": 1, "residual": 2, "first_tiles": 3},
    lambda _: ("q", "k", "v"),
)
RULES = [
    Rule(
        ["stick_attention_forward"],
        _strategies,
        lambda _, name: (_OP, name),
        _compute,
        backward=("stick_attention_backward", _BACKWARD),
    ),
    Rule(["stick_attention_decode"], _decode_strategies, lambda _, name: ("stick_attention_decode", name)),
]
