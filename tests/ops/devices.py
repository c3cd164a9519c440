"""Which kernels serve the tensors of a test."""

import os

import torch

from moduleformer_ext._extension import build_info, cuda_kernels

EMULATED = build_info()["cuda_dispatch"] == "CPU"
"""Whether the CUDA kernels serve CPU tensors, as under tools/emulated.sh."""


HOPPER = EMULATED and os.environ.get("CUDASIM_ARCH") == "90" and any(arch == 90 for _, _, arch in cuda_kernels())
"""Whether kernels of sm_90a serve on the emulated device, beside those of sm_80."""


def on_cuda(device: torch.device) -> bool:
    """Whether the CUDA kernels serve a device, the emulated one's included."""
    return EMULATED or device.type == "cuda"


def cases_for(device: torch.device, everywhere: list, cpu: list) -> list:
    """What a test runs through: on the emulated device, which is slow, and on a GPU less than on the CPU."""
    return everywhere if on_cuda(device) else everywhere + cpu
