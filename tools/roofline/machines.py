"""What GPUs can do per multiprocessor and clock, each number with its source.

[guide]      CUDA C++ Best Practices Guide 13 (Programming Guide 12), "Throughput of Native Arithmetic Instructions"
[limits]     CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
[A100]       NVIDIA A100 80GB SXM data sheet; "NVIDIA A100 Tensor Core GPU Architecture" for L2: 5120 bytes per clock
[L40S]       NVIDIA L40S data sheet; "NVIDIA Ada GPU Architecture"
[H100]       NVIDIA H100 SXM data sheet; "NVIDIA H100 Tensor Core GPU Architecture"
[H200]       NVIDIA H200 SXM data sheet
[B200]       NVIDIA Blackwell data sheet, HGX B200, dense, per GPU; 148 multiprocessors as the driver reports
[Luo]        Luo et al., "Benchmarking and Dissecting the NVIDIA Hopper GPU Architecture" (arXiv 2402.13499): mma.sync
             reaches 62 % of wgmma's peak
[mma B200]   no published figure: Ampere's rate is assumed, at which authors of kernels found it (8.5 cycles per
             HMMA.16816 and quarter of a multiprocessor, where Ampere has 8)
[F2FP]       packed conversions to 16 bits: 64 instructions, as measured on RTX 5070 Ti; [guide] has 16 for conversions
[L2]         64 bytes into a multiprocessor: an assumption, nothing is published; less where all of them read
[wavefront]  Nsight Compute documentation, "Memory Tables": shared memory moves 128 bytes per clock
"""

from __future__ import annotations

from dataclasses import dataclass

from cuda_report import ARCHITECTURES, Architecture

WARP = 32
ISSUES = 4  # warp instructions [guide]: four schedulers, each one instruction
SPECIAL = 16  # results [guide]
SHUFFLES = 32  # results [guide]
INTEGERS = 64  # results [guide]; packed conversions [F2FP]
SHARED_BYTES = 128  # [wavefront]


@dataclass(frozen=True)
class Gpu:
    name: str
    target: str  # of ptxas, for kernels of sm_80
    architecture: Architecture
    multiprocessors: int
    tensor_flops: float  # per second, dense bf16 with float32 sums
    tensor_per_clock: int  # the same per clock and multiprocessor: the clock follows
    mma_per_clock: float  # what mma.sync reaches of it
    fp32: int  # results [guide]
    l2_per_clock: float  # bytes that a multiprocessor reads from the L2 cache
    memory_bytes: float  # per second

    @property
    def clock(self) -> float:
        """The clock at which the tensor cores' published peak holds."""
        return self.tensor_flops / (self.multiprocessors * self.tensor_per_clock)

    @property
    def memory_per_clock(self) -> float:
        return self.memory_bytes / (self.multiprocessors * self.clock)


SM = {architecture.name: architecture for architecture in ARCHITECTURES}
SM["sm_100"] = Architecture("sm_100", 64, 32, 228 << 10)  # [limits]
HOPPER = {
    "target": "sm_90",
    "architecture": SM["sm_90"],
    "multiprocessors": 132,  # [H100] [H200]
    "tensor_flops": 989.4e12,  # [H100] [H200]
    "tensor_per_clock": 4096,  # [H100]: 512 FMA by each of four tensor cores
    "mma_per_clock": 0.62 * 4096,  # [Luo]
    "fp32": 128,
    "l2_per_clock": 64,  # [L2]
}
GPUS = (
    Gpu("A100", "sm_80", SM["sm_80"], 108, 312e12, 2048, 2048, 64, 5120 / 108, 2039e9),  # [A100]
    Gpu("L40S", "sm_89", SM["sm_89"], 142, 362.05e12, 1024, 1024, 128, 64, 864e9),  # [L40S] [L2]
    Gpu(name="H100", memory_bytes=3350e9, **HOPPER),  # [H100]
    Gpu(name="H200", memory_bytes=4800e9, **HOPPER),  # [H200]
    # tcgen05 multiplies at 8192; no kernel here uses it; [mma B200]
    Gpu("B200", "sm_100", SM["sm_100"], 148, 2250e12, 8192, 2048, 128, 64, 8000e9),  # [B200] [L2]
)
