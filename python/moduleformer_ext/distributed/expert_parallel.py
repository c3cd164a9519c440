"""Expert parallelism: every process of a mesh holds its own experts, and tokens travel to them and back.

Two all-to-alls of rows for a layer of feed-forward experts, and two for either projection of attention; backward as
many. Sent is one row for every slot whose expert is elsewhere, beside one number per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moduleformer_ext import ops
from moduleformer_ext.nn import Block
from moduleformer_ext.nn.dispatch import Dispatch
from moduleformer_ext.types import ExpertLayout, Segments


def spread_experts(blocks: Iterable[Block], mesh: DeviceMesh) -> None:
    """Spread the experts of layers over the processes of a mesh of one dimension, all kinds of experts of all layers.

    The matrices become DTensors, cut along their experts as ``Shard(0)`` does: process p of P has the p-th
    ceil(E / P) of a layer's E experts, the last ones fewer or none; where new experts train apart from old ones, of
    either. Gradients are those of the mean of the processes' losses, as if they had been averaged over the mesh.
    """
    for block in blocks:
        for layer in (block.attn.q_proj, block.mlpf):
            for matrices in (layer.experts, layer.output_experts):
                for name, weight in list(matrices.named_parameters()):
                    spread = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
                    matrices.register_parameter(name, nn.Parameter(spread, requires_grad=weight.requires_grad))
            segments = [weight.shape[0] for weight in layer.experts.parameters()]
            layer.exchange = ExpertExchange(mesh, segments)


class ExpertExchange:
    """Arranges slots for experts that are spread over a mesh.

    Args:
        segments: the sizes of the segments of a parameter with an expert dimension.
    """

    def __init__(self, mesh: DeviceMesh, segments: Sequence[int]) -> None:
        self.mesh = mesh
        owners = [expert // -(-size // mesh.size()) for size in segments for expert in range(size)]
        order = sorted(range(len(owners)), key=owners.__getitem__)
        self.held = [owners.count(process) for process in range(mesh.size())]
        """How many experts each process has."""
        self._places = None if len(segments) == 1 else torch.tensor(order).argsort()
        """Expert -> its number by process; None for the same."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # reads values
    def __call__(self, expert_ids: Tensor) -> Dispatch:
        """Tell every process what it will get; a GPU is waited for."""
        if self._places is not None:
            self._places = self._places.to(expert_ids.device)
            expert_ids = self._places[expert_ids.long()]
        layout = ops.expert_layout(expert_ids, sum(self.held))
        own, size = self.held[self.mesh.get_local_rank()], self.mesh.size()
        counts = _travel(layout.counts, self.held, [own] * size, self.mesh)
        numbers = iter(torch.cat([layout.counts, counts]).tolist())
        sent = [sum(islice(numbers, held)) for held in self.held]
        received = [sum(islice(numbers, own)) for _ in range(size)]
        # From each process come the rows of the first own expert, of the second, ...
        ids = torch.arange(own, device=counts.device).repeat(size)
        ids = ids.repeat_interleave(counts, output_size=sum(received))
        return _Dispatch(self.mesh, layout, sent, received, ops.expert_layout(ids[:, None], own) if own else None)


class _Dispatch(Dispatch):
    def __init__(
        self, mesh: DeviceMesh, layout: ExpertLayout, sent: list[int], received: list[int], own: ExpertLayout | None
    ) -> None:
        self._mesh = mesh
        self._layout = layout
        self._sent = sent
        self._received = received
        self._own = own
        """Of the received rows; None on a process without experts."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the sizes are other ones at every step
    def apply(
        self,
        compute: Callable[..., Tensor],
        x: Tensor,
        weights: Sequence[Segments],
        *,
        x_order: str = "token",
        out_order: str = "token",
        gates: Tensor | None = None,
    ) -> Tensor:
        choices = self._layout.num_choices
        to_expert, to_slot = self._layout.slot_order, self._layout.position
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # the product would round, too
            x = x.to(torch.get_autocast_dtype(kind))
        if x_order == "token":
            x = _TakeRows.apply(x, to_expert // choices, to_slot, choices)
        elif x_order == "slot":
            x = _TakeRows.apply(x.flatten(0, 1), to_expert, to_slot, 1)
        rows = self._send(x)
        parts = [self._parts(weight) for weight in weights]
        if self._own is None:
            width = next(iter(_segments(weights[-1]))).shape[2]
            rows = rows[:, :1].expand(-1, width)
        else:
            rows = compute(rows, *([part for part in own if len(part)] for own in parts), self._own)
        for empty in (part for own in parts for part in own if not len(part)):
            rows = rows + empty.sum().to(rows.dtype)  # so that it has a gradient, of no elements
        rows = self._bring_back(rows)
        if out_order == "expert":
            return rows
        slots = _TakeRows.apply(rows, to_slot, to_expert, 1)
        slots = slots.view(len(slots) // choices, choices, slots.shape[1])
        if out_order == "slot":
            return slots
        return (slots if gates is None else slots * gates[:, :, None]).sum(1).to(slots.dtype)

    def _send(self, rows: Tensor) -> Tensor:
        return _travel(rows, self._sent, self._received, self._mesh)

    def _bring_back(self, rows: Tensor) -> Tensor:
        return _travel(rows, self._received, self._sent, self._mesh)

    def _parts(self, weight: Segments) -> list[Tensor]:
        """What this process holds of each segment."""
        parts = [part.to_local() if isinstance(part, DTensor) else part for part in _segments(weight)]
        return [_Mean.apply(part, self._mesh.size()) for part in parts]


class BalancedExchange:
    """What an :class:`ExpertExchange` keeps in memory where every process gets as many rows as it sends; nothing is
    sent. ``count`` processes hold the experts.
    """

    def __init__(self, num_experts: int, count: int) -> None:
        self.num_experts = num_experts
        self.held = -(-num_experts // count)

    def __call__(self, expert_ids: Tensor) -> Dispatch:
        """As if what comes were what is sent, for the first experts."""
        received = ops.expert_layout(expert_ids.reshape(-1, 1) % self.held, self.held)
        return _Balanced(ops.expert_layout(expert_ids, self.num_experts), received, self.held)


class _Balanced(_Dispatch):
    def __init__(self, layout: ExpertLayout, received: ExpertLayout, own: int) -> None:
        self._layout = layout
        self._own = received
        self._held = own

    def _send(self, rows: Tensor) -> Tensor:
        return rows.clone()

    def _bring_back(self, rows: Tensor) -> Tensor:
        return rows.clone()

    def _parts(self, weight: Segments) -> list[Tensor]:
        return [_segments(weight)[0][: self._held]]


def _travel(rows: Tensor, sent: list[int], received: list[int], mesh: DeviceMesh) -> Tensor:
    """Rows, sorted by where they go, in exchange for those that come, sorted by where they are from."""
    rows = functional.all_to_all_single_autograd(rows.contiguous(), received, sent, mesh.get_group())
    return functional.wait_tensor(rows)


def _segments(weight: Segments) -> Sequence[Tensor]:
    return [weight] if isinstance(weight, Tensor) else weight


class _TakeRows(torch.autograd.Function):
    """x[rows], each row of x ``copies`` times. ``back`` is where the copies of row r are in the result, at r * copies
    and after. Sums have an order, which those of the gradient of an index need not have on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        taken = grad.index_select(0, back)
        if ctx.copies > 1:
            taken = taken.view(len(taken) // ctx.copies, ctx.copies, taken.shape[1]).sum(1)
        return taken, None, None, None


class _Mean(torch.autograd.Function):
    """Its argument, with a part of the gradient: tokens of ``count`` processes have added to it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, count: int) -> Tensor:
        ctx.count = count
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.count, None
