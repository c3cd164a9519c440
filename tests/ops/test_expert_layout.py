import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import assert_equals_reference, random_ids

from moduleformer_ext.ops import expert_layout


def brute_force(expert_ids: torch.Tensor, num_experts: int) -> dict[str, list[int]]:
    ids = expert_ids.flatten().tolist()
    order = sorted(range(len(ids)), key=lambda slot: (ids[slot], slot))
    counts = [ids.count(expert) for expert in range(num_experts)]
    position = [0] * len(ids)
    for place, slot in enumerate(order):
        position[slot] = place
    offsets = [sum(counts[:expert]) for expert in range(num_experts + 1)]
    return {"counts": counts, "offsets": offsets, "slot_order": order, "position": position}


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    choices=st.integers(1, 4),
    num_experts=st.integers(1, 9),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**16),
)
def test_equals_a_stable_sort(tokens, choices, num_experts, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_experts, (tokens, choices), generator=generator).to(dtype)
    layout = expert_layout(ids, num_experts)
    assert layout.num_choices == choices
    for name, expected in brute_force(ids, num_experts).items():
        tensor = getattr(layout, name)
        assert tensor.dtype == torch.int32
        assert tensor.tolist() == expected, name


def test_many_slots_in_chunks_do_not_depend_on_threads(set_threads):
    ids = torch.randint(37, (150_001, 2), generator=torch.Generator().manual_seed(1))
    results = []
    for count in (1, 2, 3):
        set_threads(count)
        results.append(expert_layout(ids, 37))
    order = ids.flatten().sort(stable=True).indices.int()
    for layout in results:
        assert torch.equal(layout.slot_order, order)
        assert torch.equal(layout.position[layout.slot_order.long()], torch.arange(order.numel(), dtype=torch.int32))
        assert torch.equal(layout.counts, ids.flatten().bincount(minlength=37).int())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "choices", "experts"),
    [(0, 2, 3), (1, 1, 1), (7, 3, 5), (64, 2, 1), (65, 2, 33), (200, 4, 64), (50, 2, 2500), (70_000, 2, 9)],
)
def test_against_the_reference(tokens, choices, experts, dtype, device):
    assert_equals_reference(random_ids(tokens, choices, experts, dtype), experts, device)


def test_one_expert_takes_all(device):
    assert_equals_reference(torch.full((6000, 1), 3), 5, device)


def test_non_contiguous_ids(device):
    ids = torch.randint(5, (3, 40)).to(device).t()
    assert torch.equal(expert_layout(ids, 5).slot_order, expert_layout(ids.contiguous(), 5).slot_order)


@pytest.mark.parametrize(
    ("ids", "num_experts", "message"),
    [
        (torch.zeros(3, dtype=torch.int32), 2, "expert_ids must have 2 dimensions, got shape"),
        (torch.zeros(3, 1), 2, "expert_ids must be int32 or int64, got Float"),
        (torch.zeros(3, 1, dtype=torch.int32), 0, r"num_experts must be in \[1, 16777216\], got 0"),
        (torch.full((3, 1), 2), 2, r"expert_ids must lie in \[0, num_experts\)"),
        (torch.full((3, 1), -1), 2, r"expert_ids must lie in \[0, num_experts\)"),
    ],
)
def test_bad_input(ids, num_experts, message):
    with pytest.raises(ValueError, match=f"expert_layout: {message}"):
        expert_layout(ids, num_experts)


def test_opcheck():
    for tokens in (0, 7):
        ids = torch.randint(4, (tokens, 2))
        torch.library.opcheck(torch.ops.moduleformer_ext.expert_layout.default, (ids, 4))


def test_compiles_to_one_graph():
    def offsets(ids):
        return expert_layout(ids, 6).offsets

    ids = torch.randint(6, (10, 2))
    compiled = torch.compile(offsets, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), offsets(ids))
