import pytest
import torch
from layout_cases import NAMES, assert_equals_reference, random_ids

from moduleformer_ext.ops import expert_layout


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "choices", "experts"),
    [(0, 2, 3), (1, 1, 1), (7, 3, 5), (64, 2, 1), (65, 2, 33), (200, 4, 64), (50, 2, 2500)],
)
def test_one_block_under_any_schedule(tokens, choices, experts, dtype, device, schedule):
    assert_equals_reference(random_ids(tokens, choices, experts, dtype), experts, device)


def test_many_chunks_under_any_schedule(device, schedule):
    assert_equals_reference(random_ids(4099, 3, 40, torch.int64), 40, device)


def test_same_bits_every_time(device):
    ids = random_ids(3000, 2, 16, torch.int32).to(device)
    first = expert_layout(ids, 16)
    for _ in range(3):
        again = expert_layout(ids, 16)
        assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 4, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("tokens", [3, 5000])
def test_an_id_out_of_range_is_raised_by_the_next_launch(bad, tokens, dtype, device):
    ids = torch.zeros(tokens, 1, dtype=dtype, device=device)
    ids[tokens // 2] = bad
    layout = expert_layout(ids, 4)
    assert_equals_reference(ids.clamp(0, 3).cpu(), 4, device, layout)
    if device.type == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match=rf"expert_layout: expert_ids must lie in \[0, num_experts\), got {bad} "):
        expert_layout(ids, 4)
    assert_equals_reference(ids.clamp(0, 3).cpu(), 4, device)  # reported once; the device goes on
