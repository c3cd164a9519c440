"""The machine under test: its name, its measured limits."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from moduleformer_ext.heap import glibc

from .cells import Work, dtype_name


@cache
def _more_than_caches_hold() -> torch.Tensor:
    return torch.ones(1 << 25, device="cpu")  # 128 MB, whatever the default device


def evict() -> None:
    """In a model of many layers a layer's weights have left the caches before its next token comes."""
    _more_than_caches_hold().sum()


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no field {field}")


def peak_extra_bytes(function: Callable[[], object]) -> int | None:
    """How far resident memory rises above its level before while ``function`` runs, everything included: tensors,
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


def cpu_name() -> str:
    """The processor, with family and model where the vendor's string says little."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def path_part(name: str) -> str:
    """A device's name as part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def slug() -> str:
    """The machine's name as part of a path."""
    return f"{path_part(cpu_name())}-{os.cpu_count()}cpu"


def clock(threads: int) -> Callable[[], float]:
    """CPU time for one thread, which does not see other processes; wall time for more."""
    return time.process_time if threads == 1 else time.perf_counter


@dataclass(frozen=True)
class CpuMeter:
    """:class:`benchmarks.harness.Meter` of the CPU."""

    threads: int

    def seconds(self, run: Callable[[], object]) -> float:
        now = clock(self.threads)
        start = now()
        outputs = run()
        elapsed = now() - start
        del outputs
        return elapsed

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        return peak_extra_bytes(run)


def _best_seconds(function: Callable[[], object], budget: float) -> float:
    now = clock(torch.get_num_threads())
    function()
    best, until = float("inf"), now() + budget
    while now() < until:
        start = now()
        function()
        best = min(best, now() - start)
    return best


def _matrix_peak(dtype: torch.dtype, budget: float, n: int = 1024) -> tuple[float, str]:
    """FLOP/s of the best matrix product that torch has here, and which it is.

    oneDNN's linear beats the default mm on some machines, and is missing for 16-bit types on others, whose way to a
    16-bit product is the float32 one.
    """
    a, b = torch.randn(2, n, n).to(dtype).unbind()
    candidates: dict[str, Callable[[], object]] = {"mm": lambda: a @ b}
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        candidates["oneDNN's linear"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    if dtype != torch.float32:
        candidates["mm in float32"] = lambda: (a.float() @ b.float()).to(dtype)
    rates: dict[str, float] = {}
    for name, candidate in candidates.items():
        try:
            rates[name] = 2 * n**3 / _best_seconds(candidate, budget)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            print(f"limit of {dtype_name(dtype)} products: measured without {name}: {reason}", file=sys.stderr)
    best = max(rates, key=rates.__getitem__)
    return rates[best], best


def _read_bandwidth(budget: float) -> float:
    """Bytes per second of reading memory that no cache holds."""
    big = torch.ones(1 << 27)
    return max(
        big.nbytes / _best_seconds(reader, budget) for reader in (big.sum, big.amax, lambda: torch.dot(big, big))
    )


@dataclass(frozen=True)
class Limits:
    """Measured rates of this machine with so many threads."""

    threads: int
    matrix_flops: dict[str, float]
    read_bytes: float
    matrix_by: dict[str, str] = field(default_factory=dict)
    """The product that reached `matrix_flops`."""

    def seconds(self, work: Work) -> float:
        """The least time in which ``work`` can be done."""
        flops = self.matrix_flops[dtype_name(work.dtype)]
        return max(work.flops / flops, work.bytes_read / self.read_bytes)


def measure_limits(threads: int, *, seconds: float = 0.6) -> Limits:
    """Each probe runs for ``seconds``; its best run counts."""
    torch.set_num_threads(threads)
    peaks = {dtype_name(dtype): _matrix_peak(dtype, seconds) for dtype in (torch.float32, torch.bfloat16)}
    flops = {name: rate for name, (rate, _) in peaks.items()}
    return Limits(threads, flops, _read_bandwidth(seconds), {name: product for name, (_, product) in peaks.items()})


def describe() -> dict[str, object]:
    """Name and versions, for the head of a report."""
    from moduleformer_ext import _extension

    info = _extension.build_info()
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moduleformer_ext": info.get("version"),
        "cpu_isa": info.get("cpu_isa"),
    }
