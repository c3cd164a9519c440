"""Group routed slots by expert."""

import torch
from torch import Tensor

from moduleformer_ext.types import ExpertLayout


def expert_layout(expert_ids: Tensor, num_experts: int) -> ExpertLayout:
    """Sorts the slots of a routing by expert, stably, by counting.

    Slot ``s = t * K + j`` is choice ``j`` of token ``t``. No comparison sort and no host synchronisation: the
    counts and offsets stay tensors, and every output shape follows from the input shape.

    Args:
        expert_ids: ``[T, K]`` int32 or int64, each in ``[0, num_experts)``.
        num_experts: E, at least 1.

    Returns:
        :class:`~moduleformer_ext.types.ExpertLayout` of int32 tensors: ``counts [E]``, ``offsets [E + 1]``,
        ``slot_order [S]`` (position -> slot) and its inverse ``position [S]``.

    Raises:
        ValueError: for another shape, dtype or device, for ``num_experts < 1``, and for an id out of range; on a GPU
            a later op raises that, once the kernel has run.
    """
    counts, offsets, slot_order, position = torch.ops.moduleformer_ext.expert_layout(expert_ids, num_experts)
    return ExpertLayout(counts, offsets, slot_order, position, num_choices=expert_ids.shape[1])
