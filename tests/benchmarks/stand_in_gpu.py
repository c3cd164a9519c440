"""A plugin of pytest (`-p`) under which the CPU stands in for a GPU, as far as the benchmarks look at one."""

from types import SimpleNamespace

import torch

from benchmarks import machine

torch.cuda.is_available = lambda: True
torch.cuda.get_device_properties = lambda: SimpleNamespace(
    name="Stand-in", major=9, minor=0, multi_processor_count=1, total_memory=1 << 30
)
torch.set_default_device = lambda device: None
machine.CudaMeter = lambda: machine.CpuMeter(1)  # type: ignore[misc,assignment]
_clocks = iter([{"clocks.sm": "2 MHz"}])
machine.clocks = lambda: next(_clocks, {"clocks.sm": "1 MHz"})
