"""The bytes that a process sends to others, counted as collectives are called, and the fewest for tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moduleformer_ext.distributed.traffic import bytes_of_slot
from moduleformer_ext.models import MoLMForCausalLM
from moduleformer_ext.nn import BlockRoutes

KINDS = ("gather", "scatter", "reduce", "exchange")


class Traffic(TorchDispatchMode):
    """Counts, in ``sent``, what this process sends: to gather parameters, to scatter gradients, to add up what all
    have, to exchange tokens. Of n processes each sends its n-th part to the n - 1 others, or n - 1 parts to them; an
    all-reduce is both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = dict.fromkeys(KINDS, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            whole, part = sorted((args[0].nbytes, args[1].nbytes), reverse=True)
            self.sent["gather" if "allgather" in name else "scatter"] += whole - part
        elif "all_reduce" in name or name == "c10d::allreduce_":
            tensors = [tensor for tensor in pytree.tree_leaves(args) if isinstance(tensor, Tensor)]
            self.sent["reduce"] += 2 * sum(tensor.nbytes for tensor in tensors)  # at most: times (n - 1) / n
        elif name == "_c10d_functional::all_to_all_single":
            rows, _, sizes, group = args
            stays = sizes[(_resolve_process_group(group) if isinstance(group, str) else group).rank()]
            self.sent["exchange"] += rows.nbytes * (len(rows) - stays) // max(len(rows), 1)
        return func(*args, **(kwargs or {}))


def fewest_exchanged(
    model: MoLMForCausalLM, routes: Sequence[BlockRoutes], held: Iterator[Sequence[int]], rank: int, *, size: int = 4
) -> int:
    """What has to be sent for the tokens of one process in a step: a row for every slot whose expert is elsewhere,
    there and back, forward and backward.

    Args:
        routes: of each layer.
        held: of each router, in their order, how many experts each process has.
        rank: of the process whose tokens these are.
        size: bytes of a number.
    """
    sent = 0
    for block in routes:
        for kind, route in zip(("attention", "ffn"), block, strict=True):
            of_processes = next(held)
            first = sum(of_processes[:rank])
            own = (route.expert_ids >= first) & (route.expert_ids < first + of_processes[rank])
            sent += int((~own).sum()) * bytes_of_slot(model.config, kind, size=size)
    return sent
