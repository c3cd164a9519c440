"""Expert matrices for DTensors: tokens, experts or the features of every expert can be spread over processes.

The layout is that of all tokens, on every process; each makes the one of its own share from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Shard

from moduleformer_ext.ops._dtensor.strategies import MEMBERS, Arguments, Backward, Plan, Rule, Strategy, is_traced
from moduleformer_ext.ops.grouped_gemm import GATED_ACTIVATIONS

_OPS = torch.ops.moduleformer_ext
_LAYOUT = ("offsets", "slot_order", "position")
_TOKENS = Strategy("tokens", {"x": Shard(0), "gates": Shard(0)}, [Shard(0), None])
_EXPERTS, _DEPTH = "experts", "depth"


def _by_experts(*matrices: str) -> Strategy:
    return Strategy(_EXPERTS, dict.fromkeys(matrices, Shard(0)), [Partial(), None])


def _gemm_strategies(a: Arguments) -> list[Strategy]:
    depth, columns = a["weight"][0].shape[1:]
    found = [_by_experts("weight")]
    if "expert" not in (a["x_order"], a["out_order"]):
        found.append(_TOKENS)
    if a["activation"] is None:
        inputs = {"x": Shard(a["x"].dim() - 1), "weight": Shard(1)}
        found.append(Strategy(_DEPTH, inputs, [Partial(), None], depth, frozenset({"bias"})))
    if a["activation"] not in GATED_ACTIVATIONS:
        result = Shard(2 if a["out_order"] == "slot" else 1)
        found.append(Strategy("columns", {"weight": Shard(2), "bias": Shard(1)}, [result, None], columns))
    return found


def _ffn_strategies(a: Arguments) -> list[Strategy]:
    found = [_TOKENS]
    if [segment.shape[0] for segment in a["up"]] == [segment.shape[0] for segment in a["down"]]:
        found.append(_by_experts("up", "down"))
    if a["activation"] not in GATED_ACTIVATIONS:
        inputs = {"up": Shard(2), "up_bias": Shard(1), "down": Shard(1)}
        found.append(Strategy(_DEPTH, inputs, [Partial(), None], a["down"][0].shape[1], frozenset({"down_bias"})))
    return found


@dataclass(frozen=True)
class _Op:
    """What the two ops differ in."""

    name: str
    matrices: Sequence[str]
    biases: Sequence[str]
    """One for each of the matrices. The last one is added to a sum over the depth."""

    def rule(self, strategies: Callable[[Arguments], list[Strategy]]) -> Rule:
        backward = Backward({"grad": 0}, {"hidden": 1}, self.gradients)
        return Rule(
            [self.name, f"{self.name}_forward"],
            strategies,
            self._label,
            self._compute,
            backward=(f"{self.name}_backward", backward),
            local_results=frozenset({1}),
        )

    def _label(self, _: Arguments, name: str) -> tuple[str, str]:
        return self.name, MEMBERS.get(name, name)

    def gradients(self, a: Arguments) -> list[str]:
        biases = [name for name in self.biases if name in a]
        return ["x", "gates", *biases, *(name for name in self.matrices for _ in a[name])]

    def _compute(self, function: Callable[..., Any], local: Arguments, plan: Plan) -> Any:
        if plan.uses(_TOKENS.name):
            local |= _own_tokens(local, plan)
        bias = self.biases[-1]
        if local.get(bias) is not None and not plan.is_first(_DEPTH):  # added by one process
            local[bias] = torch.zeros_like(local[bias])
        if plan.uses(_EXPERTS):
            return _own_experts(self, function, local, plan)
        return function(*local.values())


def _own_tokens(local: Arguments, plan: Plan) -> Arguments:
    """The layout of this process's tokens: an expert's slots keep their order."""
    start, tokens = plan.part("x")
    k, offsets = local["num_choices"], local["offsets"]
    position = local["position"].narrow(0, start * k, tokens * k)
    ids = torch.bucketize(position, offsets[1:], right=True, out_int32=True).view(tokens, k)
    return dict(zip(_LAYOUT, _OPS.expert_layout(ids, offsets.shape[0] - 1)[1:], strict=True))


def _own_experts(op: _Op, function: Callable[..., Any], local: Arguments, plan: Plan) -> Any:
    """The op for the slots of this process's experts, as if each were a token that chose one expert."""
    if is_traced(local["offsets"]):
        raise NotImplementedError(
            f"{op.name}: {op.matrices[0]} must not be sharded by experts under torch.compile or torch.export, which "
            "cannot know how many slots a process has; leave the op out of what is compiled"
        )
    own = _own_numbers(plan, op.matrices[0])
    slots = _Slots(local, own)
    x_order, out_order = local.get("x_order", "token"), local.get("out_order", "token")
    local["x"] = slots.take(local["x"], x_order)
    if local["gates"] is not None:
        local["gates"] = slots.take(local["gates"][:, :, None], "slot")
    if "x_order" in local:
        local |= {"x_order": "expert", "out_order": "expert" if local["gates"] is None else "token"}
    biases = {name: local[name] for name in op.biases if local.get(name) is not None}
    local |= {name: bias[own or [0]] for name, bias in biases.items()}
    if not own:  # an expert that nobody chose keeps the op's shapes
        for name in op.matrices:
            first, *others = local[name]
            local[name] = [first.new_zeros(1, *first.shape[1:]), *others]
    local |= slots.layout
    if "grad" not in local:
        results = function(*local.values())
        if isinstance(results, Tensor):
            return slots.put(results, out_order)
        return slots.put(results[0], out_order), results[1]

    local["grad"] = slots.take(local["grad"], out_order)
    gradients = function(*local.values())
    for i, name in enumerate(op.gradients(local)):
        gradient = gradients[i]
        if gradient.dim() == 1:  # stands for one that nobody asked for
            continue
        if name == "x":
            gradients[i] = slots.put(gradient, x_order)
        elif name == "gates":
            gradients[i] = slots.put(gradient, "slot")[:, :, 0]
        elif name in biases:
            gradients[i] = torch.zeros_like(biases[name])
            gradients[i][own] = gradient[: len(own)]
        elif not own:
            gradients[i] = gradient[:0]
    return gradients


def _own_numbers(plan: Plan, matrices: str) -> list[int]:
    """Of this process's experts, among all."""
    own: list[int] = []
    first = 0
    for size in plan.sizes[matrices]:
        start, length = plan.part(matrices, size)
        own += range(first + start, first + start + length)
        first += size
    return own


class _Slots:
    """The slots of some experts: where they are in rows of every order."""

    def __init__(self, local: Arguments, experts: Sequence[int]) -> None:
        device = local["offsets"].device
        bounds = local["offsets"].tolist()
        ranges = [(bounds[expert], bounds[expert + 1]) for expert in experts]
        places = [torch.arange(begin, end, device=device) for begin, end in ranges]
        self._places = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64, device=device)
        self._slots = local["slot_order"][self._places].long()
        self._k = local["num_choices"]
        self._num_slots = local["slot_order"].shape[0]
        ends = list(accumulate((end - begin for begin, end in ranges), initial=0))
        order = torch.arange(ends[-1], dtype=torch.int32, device=device)
        offsets = torch.tensor(ends if ranges else [0, 0], dtype=torch.int32, device=device)
        self.layout = {"offsets": offsets, "slot_order": order, "position": order, "num_choices": 1}

    def take(self, rows: Tensor, order: str) -> Tensor:
        """The slots' rows."""
        if order == "expert":
            return rows[self._places]
        return rows[self._slots // self._k] if order == "token" else rows.flatten(0, 1)[self._slots]

    def put(self, rows: Tensor, order: str) -> Tensor:
        """Rows of all slots (order "token": their sums) that are zero where these have none."""
        every = rows.new_zeros(self._num_slots, *rows.shape[1:])
        every[self._places if order == "expert" else self._slots] = rows
        if order == "expert":
            return every
        every = every.unflatten(0, (self._num_slots // self._k, self._k))
        return every.sum(1) if order == "token" else every


RULES = [
    _Op("grouped_gemm", ["weight"], ["bias"]).rule(_gemm_strategies),
    _Op("expert_ffn", ["up", "down"], ["up_bias", "down_bias"]).rule(_ffn_strategies),
]
