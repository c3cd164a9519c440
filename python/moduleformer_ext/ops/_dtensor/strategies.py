"""What an op's rule is made of: strategies, each a way to compute it on the processes of one mesh dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

Arguments = dict[str, Any]
"""An op's arguments by the names in its schema."""
MEMBERS = {
    **{name: f"layout.{name}" for name in ("offsets", "slot_order", "position")},
    **{name: f"weight.{name}" for name in ("values", "scales")},
}
"""What messages call those that are a member of one argument in Python; csrc/bindings/op.cpp does so, too."""


@dataclass(frozen=True)
class Strategy:
    """How each of n processes contributes to a result."""

    name: str
    inputs: Mapping[str, Placement] = field(default_factory=dict)
    """Placements of arguments; of others Replicate."""
    outputs: Sequence[Placement | None] = ()
    """Placements of results. None: an intermediate result that only this process's backward pass can read."""
    divides: int = 0
    """n must divide this."""
    whole_gradients: frozenset[str] = frozenset()
    """Replicated arguments whose gradient every process computes as a whole. That of others is a sum over processes."""

    def placement(self, argument: str) -> Placement:
        return self.inputs.get(argument, Replicate())

    def gradient_placement(self, argument: str) -> Placement:
        placement = self.placement(argument)
        if isinstance(placement, Shard) or self is REPLICATED or argument in self.whole_gradients:
            return placement
        return Partial()

    def result_placement(self, i: int) -> Placement | None:
        return Replicate() if self is REPLICATED and not self.outputs else self.outputs[i]


REPLICATED = Strategy("replicated")
"""Every process does all the work: legal for every op."""


@dataclass(frozen=True)
class Backward:
    """Where the arguments of X_backward come from; besides, it takes those of X."""

    gradients: Mapping[str, int]
    """Arguments that are gradients of X's results."""
    results: Mapping[str, int]
    """Arguments that are X's results."""
    returns: Callable[[Arguments], Sequence[str]]
    """The arguments of X whose gradients come back, in their order."""


@dataclass(frozen=True)
class Rule:
    """An op for DTensors."""

    ops: Sequence[str]
    """X, and what has the same arguments and results."""
    strategies: Callable[[Arguments], Sequence[Strategy]]
    """All but REPLICATED, of arguments that are right."""
    label: Callable[[Arguments, str], tuple[str, str]]
    """What messages call the op and an argument."""
    compute: Callable[[Callable[..., Any], Arguments, Plan], Any] = lambda function, local, plan: function(
        *local.values()
    )
    """The results for local arguments."""
    backward: tuple[str, Backward] | None = None
    local_results: frozenset[int] = frozenset()
    """Results that are no DTensors under any strategy: see Strategy.outputs."""


class Plan:
    """The strategy of each mesh dimension, and which part of a tensor this process has under them."""

    def __init__(self, mesh: DeviceMesh, chosen: Sequence[Strategy], arguments: Arguments) -> None:
        self.mesh = mesh
        self.chosen = chosen
        self.sizes = {
            name: [tensor.shape[0] for tensor in tensors_of(value) if tensor.dim()] for name, value in arguments.items()
        }
        """The first dimension of every tensor of an argument, over all processes."""

    def uses(self, name: str) -> bool:
        return any(strategy.name == name for strategy in self.chosen)

    def is_first(self, name: str) -> bool:
        """Whether this process is the first of those that share the work by a strategy."""
        return all(self._rank(dim) == 0 for dim, strategy in enumerate(self.chosen) if strategy.name == name)

    def placements(self, argument: str) -> list[Placement]:
        return [strategy.placement(argument) for strategy in self.chosen]

    def part(self, argument: str, size: int | None = None) -> tuple[int, int]:
        """Where this process's part of an argument begins in its first dimension, and its length; of its only tensor
        or one of this size.
        """
        size = self.sizes[argument][0] if size is None else size
        start = 0
        for dim, placement in enumerate(self.placements(argument)):
            if placement == Shard(0):
                begin, size = _chunk(size, self.mesh.size(dim), self._rank(dim))
                start += begin
        return start, size

    def boundaries(self, argument: str) -> list[int]:
        """Where the parts of all processes begin and end."""
        parts = [(0, self.sizes[argument][0])]
        for dim, placement in enumerate(self.placements(argument)):
            if placement == Shard(0):
                processes = self.mesh.size(dim)
                parts = [
                    (start + begin, length)
                    for start, size in parts
                    for begin, length in (_chunk(size, processes, rank) for rank in range(processes))
                ]
        return [0, *(start + length for start, length in parts)]

    def _rank(self, dim: int) -> int:
        return self.mesh.get_local_rank(dim)


def _chunk(size: int, processes: int, rank: int) -> tuple[int, int]:
    """Begin and length of a part, as Shard cuts."""
    length = -(-size // processes)
    begin = min(rank * length, size)
    return begin, min(length, size - begin)


def choose(strategies: Sequence[Strategy], arguments: Arguments, mesh: DeviceMesh) -> list[Strategy]:
    """For each mesh dimension the strategy that moves the fewest bytes, and among equals the one that takes most
    arguments as they are, the first of several. Every process chooses the same.
    """
    tensors = [(name, cast(DTensor, tensor)) for name in arguments for tensor in tensors_of(arguments[name])]
    chosen: list[Strategy] = []
    for dim in range(mesh.ndim):

        def price(strategy: Strategy, dim: int = dim) -> tuple[float, int]:
            moves = [
                _bytes_moved(tensor, tensor.placements[dim], strategy.placement(name), mesh.size(dim))
                for name, tensor in tensors
                if tensor.placements[dim] != strategy.placement(name)
            ]
            return sum(moves), len(moves)

        chosen.append(min((s for s in (REPLICATED, *strategies) if _divides(s, chosen, mesh)), key=price))
    return chosen


def _divides(strategy: Strategy, chosen: Sequence[Strategy], mesh: DeviceMesh) -> bool:
    """Whether the next mesh dimension may choose it, too."""
    processes = mesh.size(len(chosen))
    for dim, other in enumerate(chosen):
        if other.name == strategy.name:
            processes *= mesh.size(dim)
    return strategy.divides % processes == 0


def _bytes_moved(tensor: Tensor, have: Placement, want: Placement, processes: int) -> float:
    """Received by each of the processes."""
    if isinstance(have, Replicate):
        return 0.0
    whole = tensor.numel() * tensor.element_size() * (processes - 1) / processes
    if isinstance(have, Shard) and isinstance(want, Shard):
        return whole / processes
    return whole if isinstance(have, Shard) or isinstance(want, Shard) else 2 * whole


def is_traced(tensor: Tensor) -> bool:
    """Whether its values cannot be read."""
    return is_fake(tensor) or tensor.is_meta


def tensors_of(argument: Any) -> Sequence[Tensor]:
    """The tensors in an argument."""
    if isinstance(argument, Tensor):
        return (argument,)
    if isinstance(argument, (list, tuple)):
        return [element for element in argument if isinstance(element, Tensor)]
    return ()
