"""Routings, and how their layout is compared with the reference's, for the tests of expert_layout."""

from __future__ import annotations

import torch

from moduleformer_ext import reference
from moduleformer_ext.ops import expert_layout
from moduleformer_ext.types import ExpertLayout

NAMES = ("counts", "offsets", "slot_order", "position")


def random_ids(tokens: int, choices: int, experts: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(experts, (tokens, choices), generator=generator).to(dtype)


def assert_equals_reference(
    ids: torch.Tensor, experts: int, device: torch.device, layout: ExpertLayout | None = None
) -> None:
    layout = layout or expert_layout(ids.to(device), experts)
    expected = reference.expert_layout(ids, experts)
    assert layout.num_choices == expected.num_choices
    for name in NAMES:
        assert torch.equal(getattr(layout, name).cpu(), getattr(expected, name)), name
