"""`moduleformer-ext info`."""

import json
from itertools import groupby

import torch

from moduleformer_ext._extension import build_info, cuda_kernels
from moduleformer_ext.cli.source import AsJson
from moduleformer_ext.display import facts

_RUNS_ON = {80: "sm_80 and newer", 90: "sm_90a alone"}
"""By the architecture of a kernel."""


def serving_kernels(capability: tuple[int, int], kernels: list[tuple[str, str, int]]) -> str:
    """Which of the kernels serve a GPU of a compute capability, in words."""
    if not kernels:
        return "no kernels: this build has no CUDA library"
    if capability < (8, 0):
        return "no kernels: they begin with compute capability 8.0"
    own = sorted({op for op, _, arch in kernels if arch == 90}) if capability == (9, 0) else []
    return f"sm_90a kernels of {', '.join(own)} in 16-bit types, sm_80's for the rest" if own else "sm_80 kernels"


def gpu_at_hand(kernels: list[tuple[str, str, int]]) -> str | None:
    """Name and compute capability of torch's current GPU, and which kernels serve it."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return f"{name}, compute capability {capability[0]}.{capability[1]}: {serving_kernels(capability, kernels)}"


def run(*, as_json: AsJson = False) -> int:
    """Print what the extension was built with and what it can run here."""
    kernels = cuda_kernels()
    information = build_info() | {"gpu": gpu_at_hand(kernels)}
    if as_json:
        listed = [{"op": op, "name": name, "arch": arch} for op, name, arch in kernels]
        print(json.dumps({**information, "cuda_kernels": listed}, indent=2))
        return 0
    print(facts(list(information.items())))
    for (op, arch), rows in groupby(kernels, key=lambda row: (row[0], row[2])):
        print(f"\nCUDA kernels of {op}, {_RUNS_ON[arch]}")
        print("\n".join(f"  {name}" for _, name, _ in rows))
    return 0
