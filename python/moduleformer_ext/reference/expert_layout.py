"""Slots sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moduleformer_ext.types import ExpertLayout


def expert_layout(expert_ids: Tensor, num_experts: int) -> ExpertLayout:
    """Sort the slots of expert_ids [T, K] (int32 or int64, values in [0, num_experts)) by expert, stably."""
    slots = expert_ids.flatten().long()
    slot_order = slots.argsort(stable=True)
    position = torch.empty_like(slot_order)
    position[slot_order] = torch.arange(len(slots), device=slots.device)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=slots.device)
    counts = counts.index_add(0, slots, torch.ones_like(slots, dtype=torch.int32))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=slots.device)
    offsets[1:] = counts.cumsum(0)
    return ExpertLayout(counts, offsets, slot_order.int(), position.int(), expert_ids.shape[1])
