"""linear_cross_entropy for DTensors: rows can be spread over processes."""

from __future__ import annotations

from torch.distributed.tensor import Partial, Shard

from moduleformer_ext.ops._dtensor.strategies import Arguments, Backward, Rule, Strategy

_OP = "linear_cross_entropy"


def _strategies(a: Arguments) -> list[Strategy]:
    if a["reduction"] == "mean":  # over rows that all processes count together
        return []
    return [
        Strategy(
            f"rows of dimension {dim}",
            {"x": Shard(dim), "target": Shard(dim)},
            [Partial() if a["reduction"] == "sum" else Shard(dim), None, None],
        )
        for dim in range(a["target"].dim())
    ]


_BACKWARD = Backward({"grad": 0}, {"grad_x": 1, "grad_weight": 2}, lambda _: ("x", "weight"))
RULES = [
    Rule(
        [_OP, f"{_OP}_forward"],
        _strategies,
        lambda _, name: (_OP, name),
        backward=(f"{_OP}_backward", _BACKWARD),
        local_results=frozenset({1, 2}),  # gradients that the forward pass makes
    )
]
