"""Models over several processes, on PyTorch's own engine: FSDP2, DeviceMesh, distributed checkpoints.

`sharding`, `tensor_parallel` and `checkpoint` are imported where they are needed: what they stand on takes a second.
"""

from moduleformer_ext.distributed.processes import (
    ALONE,
    Processes,
    ProcessLostError,
    is_restart,
    joined,
    own_device,
    started_by_torchrun,
)

__all__ = ["ALONE", "ProcessLostError", "Processes", "is_restart", "joined", "own_device", "started_by_torchrun"]
