"""The router for DTensors: tokens can be spread over processes."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.tensor import Partial, Replicate, Shard

from moduleformer_ext.ops._dtensor.strategies import Arguments, Backward, Rule, Strategy

_TOKENS, _SUM = Shard(0), Partial()
# gates, expert_ids, prob_sum, plogp_sum, logsumexp_sq_sum, counts, logits
_RESULTS = [_TOKENS, _TOKENS, _SUM, _SUM, _SUM, _SUM, _TOKENS]


def _label(a: Arguments, name: str) -> tuple[str, str]:
    gate = a["gate"]
    names = {"logits": {"x": "logits"}, "gmm": {"weight": "centroids"}}
    return "route_topk" if gate == "logits" else f"route_topk_{gate}", names.get(gate, {}).get(name, name)


def _strategies(a: Arguments) -> list[Strategy]:
    hidden = [_TOKENS] if a["hidden_weight"] is not None else [Replicate()]
    return [Strategy("tokens", {"x": _TOKENS, "noise": _TOKENS}, [*_RESULTS, *hidden])]


def _wanted(a: Arguments) -> Sequence[str]:
    names = ["x", "hidden_weight", "hidden_bias", *("weight" for _ in a["weight"])]
    return [name for name, wanted in zip(names, a["wanted"], strict=True) if wanted]


_BACKWARD = Backward(
    {"grad_gates": 0, "grad_prob_sum": 2, "grad_plogp_sum": 3, "grad_logsumexp_sq_sum": 4, "grad_logits": 6},
    {"expert_ids": 1, "logits": 6, "hidden": 7},
    _wanted,
)
RULES = [
    Rule(["route_topk", "route_topk_forward"], _strategies, _label, backward=("route_topk_backward", _BACKWARD)),
    Rule(["expert_layout"], lambda _: [], lambda _, name: ("expert_layout", name)),
]
