"""Which kernels serve the tensors of a test."""

import torch

from moduleformer_ext._extension import build_info

EMULATED = build_info()["cuda_dispatch"] == "CPU"
"""Whether the CUDA kernels serve CPU tensors, as under tools/emulated.sh."""


def on_cuda(device: torch.device) -> bool:
    """Whether the CUDA kernels serve a device, the emulated one's included."""
    return EMULATED or device.type == "cuda"
