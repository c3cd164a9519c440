"""Arithmetic of a run: fp32, or bf16 under autocast with fp32 master weights."""

import torch


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Autocast to bfloat16 for "bf16", and to nothing for "fp32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")
