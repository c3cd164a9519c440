"""Time and memory of calls on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import torch

_FLUSHED_BYTES = 256 << 20


class CudaMeter:
    """:class:`benchmarks.harness.Meter` of the current CUDA device.

    Before each call a buffer larger than any L2 cache is overwritten, so that operands come from memory; while that
    runs, the call's launches are queued, so that the time between the two events is the device's, not the launches',
    unless these take longer than the kernels.
    """

    def __init__(self) -> None:
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flushed.zero_()
        start.record()
        outputs = run()
        end.record()
        torch.cuda.synchronize()
        del outputs
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
