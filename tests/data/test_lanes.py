import numpy as np
import pytest
import torch

from moduleformer_ext.data import LaneReader, share_lanes

STREAMS = {"a": np.arange(103, dtype=np.uint16), "b": np.arange(1000, 1057, dtype=np.uint16)}


def test_lanes_read_consecutively_round_the_ring() -> None:
    reader = LaneReader(STREAMS, {"a": 3, "b": 2}, segment_length=8)
    assert reader.num_tokens == 40
    starts = [("a", 0), ("a", 34), ("a", 68), ("b", 0), ("b", 28)]
    for step in range(40):
        inputs, targets = reader.next()
        assert inputs.dtype == targets.dtype == torch.int64
        for lane, (domain, start) in enumerate(starts):
            ring = STREAMS[domain]
            at = (start + step * 8 + np.arange(9)) % len(ring)
            assert inputs[lane].tolist() == ring[at[:-1]].tolist()
            assert targets[lane].tolist() == ring[at[1:]].tolist()


def test_position_resumes() -> None:
    reader = LaneReader(STREAMS, {"a": 1, "b": 1}, segment_length=5)
    for _ in range(29):
        reader.next()
    other = LaneReader(STREAMS, {"a": 1, "b": 1}, segment_length=5)
    other.position = reader.position
    for _ in range(30):
        for expected, actual in zip(reader.next(), other.next(), strict=True):
            assert torch.equal(expected, actual)


def test_stream_must_be_longer_than_a_segment() -> None:
    with pytest.raises(ValueError, match=r"domain 'b' \(57\), got 57"):
        LaneReader(STREAMS, {"a": 1, "b": 1}, segment_length=57)
    LaneReader(STREAMS, {"a": 1, "b": 1}, segment_length=56).next()


@pytest.mark.parametrize("lanes", [3, 4, 7, 16, 64])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_share_lanes_adds_up(lanes: int, exponent: float) -> None:
    share = share_lanes({"a": 1_000_000, "b": 10_000, "c": 10}, lanes, exponent)
    assert sum(share.values()) == lanes
    assert min(share.values()) >= 1
    assert share["a"] >= share["b"] >= share["c"] or exponent == 0.0


def test_share_lanes_is_proportional() -> None:
    assert share_lanes({"a": 300, "b": 100}, 16, 1.0) == {"a": 12, "b": 4}
    assert share_lanes({"a": 900, "b": 100}, 16, 0.5) == {"a": 12, "b": 4}
    assert share_lanes({"a": 900, "b": 100}, 16, 0.0) == {"a": 8, "b": 8}
    assert share_lanes({"a": 5}, 3, 0.5) == {"a": 3}
    with pytest.raises(ValueError, match="2 domains need as many lanes, got 1"):
        share_lanes({"a": 1, "b": 1}, 1, 1.0)
