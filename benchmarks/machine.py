"""The machine under test: what it is, how calls are measured on it, what it can do at best."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from moduleformer_ext.heap import M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, glibc, keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PACKAGES = ("flash-attn", "stickbreaking-attention", "scattermoe", "triton", "transformers")
"""What peers may come from."""
_FLUSHED_BYTES = 256 << 20
_CLOCKS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


@cache
def _more_than_caches_hold() -> torch.Tensor:
    return torch.ones(1 << 25, device="cpu")  # 128 MB, whatever the default device


def evict() -> None:
    """In a model of many layers a layer's weights have left the caches before its next token comes."""
    _more_than_caches_hold().sum()


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Inside, glibc as it is in a process that never called mallopt, once large tensors have come and gone: 32 MiB and
    more are mapped afresh each time. Afterwards freed memory is kept.
    """
    if (libc := glibc()) is not None:
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)
    try:
        yield
    finally:
        keep_freed_memory()


def _status_kib(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def peak_extra_bytes(function: Callable[[], object]) -> int | None:
    """How far resident memory rises above its level before while `function` runs, everything included: tensors,
    kernels' scratch buffers, the result. None where the system cannot tell (it takes Linux).
    """
    libc, high_water_mark = glibc(), Path("/proc/self/clear_refs")
    if libc is None or not os.access(high_water_mark, os.W_OK):
        function()
        return None
    libc.malloc_trim(0)
    high_water_mark.write_text("5")  # resets VmHWM to what is resident now
    before = _status_kib("VmRSS")
    function()
    return max(0, _status_kib("VmHWM") - before) * 1024


class Meter(Protocol):
    """How a call is measured."""

    def seconds(self, run: Callable[[], object]) -> dict[str, float]:
        """How long `run` takes by each clock, the one to be reported first. What it returns is freed outside of that
        time.
        """

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """How much more memory than before `run` needs at its peak; None where that cannot be told."""


@dataclass(frozen=True)
class CpuMeter:
    """The CPU's. With one thread CPU time is reported, which does not see other processes; with
    more, wall time.
    """

    threads: int

    def seconds(self, run: Callable[[], object]) -> dict[str, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        outputs = run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        del outputs
        return {"cpu": cpu, "wall": wall} if self.threads == 1 else {"wall": wall, "cpu": cpu}

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        return peak_extra_bytes(run)


class CudaMeter:
    """The current CUDA device's.

    Before each call a buffer larger than any L2 cache is overwritten, so that operands come from memory; while that
    runs, the call's launches are queued, so that the time between the two events is the device's, not the launches',
    unless these take longer than the kernels.
    """

    def __init__(self) -> None:
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(self, run: Callable[[], object]) -> dict[str, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flushed.zero_()
        start.record()
        outputs = run()
        end.record()
        torch.cuda.synchronize()
        del outputs
        return {"device": start.elapsed_time(end) / 1e3}

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Work:
    """What any implementation has to do."""

    dtype: torch.dtype
    flops: float = 0.0
    bytes_read: float = 0.0


NO_WORK = Work(torch.float32)


@dataclass(frozen=True)
class Limits:
    """Measured rates of this machine, by number of threads or device."""

    matrix_flops: dict[str, float | None]
    """Of the best matrix product in each type; None where torch has none."""
    matrix_by: dict[str, str]
    """The product that reached it."""
    read_bytes: float
    left_out: dict[str, str] = field(default_factory=dict)
    """By type and product, why a product was not measured: not every machine has each."""

    def seconds(self, work: Work) -> float | None:
        """The least time in which `work` can be done, the slower of arithmetic and reads; None where its rate is not
        known.
        """
        flops = self.matrix_flops[dtype_name(work.dtype)]
        if work.flops and flops is None:
            return None
        return max(work.flops / (flops or 1), work.bytes_read / self.read_bytes)


def _best_seconds(function: Callable[[], object], meter: Meter, budget: float) -> float:
    function()
    times: list[float] = []
    while sum(times) < budget:
        times.append(next(iter(meter.seconds(function).values())))
    return min(times)


def _products(dtype: torch.dtype, n: int) -> dict[str, Callable[[], object]]:
    """The ways in which torch multiplies two n x n matrices.

    oneDNN's linear beats the default mm on some processors, and is missing for 16-bit types on others, whose way to a
    16-bit product is the float32 one.
    """
    a, b = torch.randn(2, n, n).to(dtype).unbind()
    products: dict[str, Callable[[], object]] = {"mm": lambda: a @ b}
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        products["oneDNN's linear"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    if dtype != torch.float32:
        products["mm in float32"] = lambda: (a.float() @ b.float()).to(dtype)
    return products


def measure_limits(meter: Meter, *, budget: float, n: int = 1024) -> Limits:
    """Each probe runs for `budget` seconds; its best run counts. A product that torch lacks here is left out, and said
    to be.
    """
    flops: dict[str, float | None] = {}
    by: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name, dtype in DTYPES.items():
        rates: dict[str, float] = {}
        for product, call in _products(dtype, n).items():
            try:
                rates[product] = 2 * n**3 / _best_seconds(call, meter, budget)
            except Exception as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                left_out[f"{name}, {product}"] = reason
                print(f"limit of {name} products: measured without {product}: {reason}", file=sys.stderr)
        flops[name] = max(rates.values(), default=None)
        if rates:
            by[name] = max(rates, key=rates.__getitem__)
    big = torch.ones(1 << 27)
    readers = (big.sum, big.amax, lambda: torch.dot(big, big))
    read_bytes = big.nbytes / min(_best_seconds(reader, meter, budget) for reader in readers)
    return Limits(flops, by, read_bytes, left_out)


NATIVE = "native"
"""Everything that the processor has."""
ISAS = {
    NATIVE: {},
    "avx512": {
        "MFX_CPU_ISA": "avx512",
        "MFX_BRGEMM": "aten",  # not our AMX kernel
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx2": {
        "MFX_CPU_ISA": "avx2",
        "MFX_BRGEMM": "aten",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "baseline": {
        "MFX_CPU_ISA": "baseline",
        "MFX_BRGEMM": "aten",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}
"""What restricts a process to an instruction set: our kernels, oneDNN, ATen's own, MKL."""


@cache
def usable_isas() -> tuple[str, ...]:
    """The instruction sets that the extension was compiled for and this processor has."""
    from moduleformer_ext import _extension

    info = _extension.build_info()
    order = ["baseline", "avx2", "avx512", "avx512_bf16"]
    within = order[: order.index(str(info["cpu_isa"])) + 1]
    return tuple(isa for isa in ISAS if isa == NATIVE or (isa in within and isa in str(info["cpu_isas"]).split()))


@cache
def cpu_name() -> str:
    """The processor, with family and model where the vendor's string says little."""
    import cpuinfo  # comes with pytest-benchmark

    info = cpuinfo.get_cpu_info()
    name = info.get("brand_raw") or platform.processor() or platform.machine()
    return f"{name} (family {info['family']}, model {info['model']})" if "family" in info else name


def path_part(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def slug(device: str = "cpu") -> str:
    """The machine's name as part of a path."""
    if device == "cpu":
        return f"{path_part(cpu_name())}-{os.cpu_count()}cpu"
    return path_part(torch.cuda.get_device_properties().name)


def clocks() -> dict[str, str]:
    """The GPU driver's version, clocks, power limit and temperature now; empty where nvidia-smi is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    device = torch.cuda.get_device_properties().uuid
    command = [program, f"--id=GPU-{device}", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    return dict(zip(_CLOCKS, values, strict=True)) if len(values) == len(_CLOCKS) else {}


def versions() -> dict[str, str]:
    """Of the other libraries, as far as they are installed."""
    return {found.name: found.version for found in importlib.metadata.distributions() if found.name in _PACKAGES}


def describe(device: str = "cpu", peers_apart: Mapping[str, str] | None = None) -> dict[str, object]:
    """Name and versions, for the head of a report; those of peers in other environments as given."""
    from moduleformer_ext import _extension

    info = _extension.build_info()
    about: dict[str, object] = {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moduleformer_ext": info.get("version"),
        "cpu_isa": info.get("cpu_isa"),
        "packages": {**versions(), **(peers_apart or {})},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        about |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return about
