"""What a GPU's figures depend on: the device, its driver and clocks, and versions."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess

import torch

PEER_PACKAGES = ("flash-attn", "stickbreaking-attention", "scattermoe", "triton")
_QUERIES = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def clocks() -> dict[str, str]:
    """The driver's version, clocks, power limit and temperature now; empty where nvidia-smi is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    device = torch.cuda.get_device_properties().uuid
    command = [program, f"--id=GPU-{device}", f"--query-gpu={','.join(_QUERIES)}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    return dict(zip(_QUERIES, values, strict=True)) if len(values) == len(_QUERIES) else {}


def versions() -> dict[str, str]:
    """Of the other libraries, as far as they are installed."""
    found = {}
    for name in PEER_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, object]:
    """For the head of a report."""
    from moduleformer_ext import _extension

    properties = torch.cuda.get_device_properties()
    info = _extension.build_info()
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moduleformer_ext": info.get("version"),
        "peers": versions(),
        "before": clocks(),
    }
