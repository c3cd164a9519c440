"""linear_decode for DTensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Partial, Shard

from moduleformer_ext.ops._dtensor.strategies import Arguments, Plan, Rule, Strategy


def _strategies(a: Arguments) -> list[Strategy]:
    last = a["x"].dim() - 1
    out, depth = a["weight"].shape
    return [
        *(Strategy(f"rows of dimension {dim}", {"x": Shard(dim)}, [Shard(dim)]) for dim in range(last)),
        Strategy("columns", {"weight": Shard(0), "bias": Shard(0)}, [Shard(last)], divides=out),
        Strategy("depth", {"x": Shard(last), "weight": Shard(1)}, [Partial()], divides=depth),
    ]


def _compute(function: Callable[..., Any], local: Arguments, plan: Plan) -> Any:
    if local["bias"] is not None and not plan.is_first("depth"):  # added by one process
        local["bias"] = torch.zeros_like(local["bias"])
    local["weight"] = local["weight"].contiguous()
    return function(*local.values())


RULES = [Rule(["linear_decode"], _strategies, lambda _, name: ("linear_decode", name), _compute)]
