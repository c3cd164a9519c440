"""Transformer-XL batches: every lane of a batch reads on where it stopped in the batch before."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moduleformer_ext.data.stream import TokenArray


class Segment(NamedTuple):
    """Inputs and the tokens that follow them, both [B, L] int64."""

    inputs: Tensor
    targets: Tensor


def share_lanes(sizes: Mapping[str, int], lanes: int, exponent: float) -> dict[str, int]:
    """Share `lanes` among domains in proportion to size ** exponent, at least one each."""
    if lanes < len(sizes):
        raise ValueError(f"batch_size: {len(sizes)} domains need as many lanes, got {lanes}")
    spare = lanes - len(sizes)
    total = sum(size**exponent for size in sizes.values())
    # Each domain's quota less the lane it has anyway, renormalised over the spare lanes.
    quota = {domain: max(lanes * size**exponent / total - 1.0, 0.0) for domain, size in sizes.items()}
    scale = spare / max(sum(quota.values()), 1e-12)
    share = {domain: 1 + int(quota[domain] * scale) for domain in sizes}
    by_remainder = sorted(sizes, key=lambda domain: (-(quota[domain] * scale % 1.0), domain))
    for domain in by_remainder[: lanes - sum(share.values())]:
        share[domain] += 1
    return share


class LaneReader:
    """Serve segments of B lanes, each reading one domain's stream consecutively from its own start.

    A stream is a ring: lane i of n starts at i/n of it and reads on past the end at the beginning, so that
    the segments before are always the true past, and one number, `position`, is the whole state. `part` is which of
    the lanes to serve, of all domains one after the other (default: all).
    """

    def __init__(
        self,
        streams: Mapping[str, TokenArray],
        lanes: Mapping[str, int],
        segment_length: int,
        part: slice = slice(None),
    ) -> None:
        if segment_length < 1:
            raise ValueError(f"segment_length: must be at least 1, got {segment_length}")
        self.segment_length = segment_length
        self.position = 0
        self._lanes: list[tuple[TokenArray, int]] = []
        for domain, count in lanes.items():
            tokens = streams[domain]
            if len(tokens) <= segment_length:
                raise ValueError(
                    f"segment_length: must be below the number of tokens in domain '{domain}' "
                    f"({len(tokens)}), got {segment_length}; give more text or shorter segments"
                )
            self._lanes += [(tokens, lane * len(tokens) // count) for lane in range(count)]
        self._lanes = self._lanes[part]

    @property
    def num_tokens(self) -> int:
        """Tokens served by one segment of all lanes."""
        return len(self._lanes) * self.segment_length

    def next(self) -> Segment:
        """Return the next segment of every lane and move on."""
        offset = self.position * self.segment_length
        rows = []
        for tokens, start in self._lanes:
            begin = (start + offset) % len(tokens)
            end = begin + self.segment_length + 1
            row = tokens[begin:end]
            if end > len(tokens):
                row = np.concatenate([row, tokens[: end - len(tokens)]])
            rows.append(row.astype(np.int64))
        self.position += 1
        block = torch.from_numpy(np.stack(rows))
        return Segment(block[:, :-1], block[:, 1:])
