"""Writes docs/cuda_roofline.md: a MODEL of the least time of the CUDA kernels, from counts on the emulated device.

    tools/emulated.sh PYTHON --run tools/cuda_roofline.py

No figure of it was measured on a GPU. Every resource of a GPU is taken at its published peak, all of them are assumed
to be busy at once and all multiprocessors to share the work evenly, so that a kernel's time is bounded from below by

    max over resources of (what the kernel asks of the resource) / (what the GPU delivers per second)

with, per multiprocessor and clock: 4 warp instructions issued, 16 results of the special-function unit, one wavefront
of shared memory; and for the whole GPU its tensor-core rate and memory bandwidth. Memory traffic is the bytes that the
kernel touches, each once, as if the L2 cache held all that is read again. PTX instructions are counted, which become
more or fewer in SASS.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parent.parent / "docs" / "cuda_roofline.md"


@dataclass(frozen=True)
class Gpu:
    """Peaks as its vendor publishes them (data sheets; dense bf16 rate with float32 sums)."""

    name: str
    arch: str
    multiprocessors: int
    clock_hz: float  # boost
    tensor_flops: float
    memory_bytes: float  # per second


GPUS = (
    Gpu("A100 40GB SXM", "sm_80", 108, 1.41e9, 312e12, 1555e9),
    Gpu("A10", "sm_86", 72, 1.695e9, 125e12, 600e9),
    Gpu("L4", "sm_89", 58, 2.04e9, 121e12, 300e9),
    Gpu("H100 SXM", "sm_90", 132, 1.83e9, 989e12, 3350e9),
)
HEAD = """# A model of the CUDA kernels' least time

Written by `tools/emulated.sh PYTHON --run tools/cuda_roofline.py`; do not edit. **A model, not a measurement**: what a
kernel asks for, counted on the emulated device, over what a GPU delivers at its published peak.

"""
FOOT = """
The shapes are small and fill no GPU: there, launches and idle multiprocessors cost more than this. They compare kernels
and show what bounds them.

"""
ISSUES, SFU_RESULTS, WAVEFRONTS = 4, 16, 1
"""Per multiprocessor and clock. CUDA C++ Programming Guide, "Arithmetic Instructions"."""


def bounds(launch: Mapping[str, Any], gpu: Gpu) -> dict[str, float]:
    """Seconds that each resource needs for one launch."""
    clocks = gpu.multiprocessors * gpu.clock_hz
    return {
        "instruction issue": launch["warp_instructions"] / (ISSUES * clocks),
        "special functions": 32 * launch["issued"]["sfu"] / (SFU_RESULTS * clocks),
        "shared memory": launch["shared_wavefronts"] / (WAVEFRONTS * clocks),
        "tensor cores": launch["mma_flops"] / gpu.tensor_flops,
        "memory": (launch["unique_bytes_read"] + launch["unique_bytes_written"]) / gpu.memory_bytes,
    }


def least_seconds(launches: Sequence[Mapping[str, Any]], gpu: Gpu) -> tuple[float, str]:
    """The bound of launches that follow one another, and what bounds the longest of them."""
    all_bounds = [bounds(launch, gpu) for launch in launches]
    longest = max(all_bounds, key=lambda found: max(found.values()))
    return sum(max(found.values()) for found in all_bounds), max(longest, key=longest.__getitem__)


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line per case, one column per GPU."""
    head = ["case", "launches", *(f"{gpu.name} ({gpu.arch})" for gpu in GPUS)]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, launches in rows.items():
        cells = [name, str(len(launches))]
        for gpu in GPUS:
            seconds, resource = least_seconds(launches, gpu)
            cells.append(f"{1e6 * seconds:.2g} µs, {resource}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cases() -> dict[str, Callable[[], object]]:
    """Fixed shapes of every op, in bfloat16."""
    import torch

    from moduleformer_ext import ops

    torch.manual_seed(0)
    found: dict[str, Callable[[], object]] = {}

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).bfloat16()

    for dim in (64, 128):
        q, k, v = (tensor(1, 512, 1, dim).requires_grad_() for _ in range(3))
        o = ops.stick_attention(q, k, v, stick_epsilon=0.0)
        grad = torch.randn_like(o)
        found[f"stick_attention forward, T 512, one head of {dim}"] = lambda q=q, k=k, v=v: ops.stick_attention(
            q, k, v, stick_epsilon=0.0
        )
        found[f"stick_attention backward, T 512, one head of {dim}"] = lambda o=o, grad=grad: o.backward(
            grad, retain_graph=True
        )
    cache = tensor(1, 2048, 1, 128)
    length = torch.tensor([2048], dtype=torch.int32)
    query = tensor(1, 1, 2, 128)
    found["stick_attention_decode, 2048 cached, two query heads of 128"] = lambda: ops.stick_attention_decode(
        query, cache, None, length, stick_epsilon=0.0
    )
    for slots in (256, 1024):
        layout = ops.expert_layout(torch.randint(8, (slots // 2, 2)), 8)
        x, gates = tensor(slots // 2, 512), torch.rand(slots // 2, 2)
        up, down = tensor(8, 512, 512), tensor(8, 512, 512)
        found[f"expert_ffn forward, {slots} slots, 8 experts of 512 x 512"] = (
            lambda x=x, up=up, down=down, layout=layout, gates=gates: ops.expert_ffn(x, up, down, layout, gates)
        )
    x, w1, b1, w2 = tensor(512, 512), tensor(256, 512), tensor(256), tensor(32, 256)
    found["route_topk_mlp forward, 512 tokens, 32 experts"] = lambda: ops.route_topk_mlp(x, w1, b1, w2, 2)
    ids = torch.randint(32, (512, 2))
    found["expert_layout, 1024 slots, 32 experts"] = lambda: ops.expert_layout(ids, 32)
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import cudasim

    cudasim.use_torch_allocator()
    rows = {}
    for name, call in cases().items():
        cudasim.reset_stats()
        call()
        rows[name] = cudasim.stats()
        print(name, flush=True)
    assert __doc__ is not None
    model = "\n\n".join(__doc__.split("\n\n")[2:])
    DOCUMENT.write_text(HEAD + model + FOOT + table(rows) + "\n")


if __name__ == "__main__":
    main()
