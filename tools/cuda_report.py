"""Writes docs/cuda_report.md: what ptxas makes of every CUDA kernel on each architecture, no GPU needed.

    python tools/cuda_report.py            the report
    python tools/cuda_report.py --check    only fail if a kernel spills registers

PTX is compiled once per source (compute_80), then assembled for each architecture, so that the figures are those of the
code that runs there just in time or from a build for it. SASS is read with nvdisasm (PyPI: nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build-ptxas"
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Icsrc", "-Iinclude", '-DMFX_CUDA_ARCHS=""']


@dataclass(frozen=True)
class Architecture:
    """Limits per multiprocessor. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    name: str
    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536

    def resident_warps(self, registers: int, threads: int, shared_bytes: int) -> int:
        """Warps that fit at a time. Registers are handed out per warp in units of 256, 1 KiB of shared memory per block
        belongs to the system."""
        warps = -(-threads // 32)
        per_warp = -(-registers * 32 // 256) * 256
        blocks = min(
            self.blocks,
            self.warps // warps,
            self.registers // (per_warp * warps),
            self.shared_bytes // (shared_bytes + 1024),
        )
        return blocks * warps


ARCHITECTURES = (
    Architecture("sm_80", 64, 32, 164 << 10),
    Architecture("sm_86", 48, 16, 100 << 10),
    Architecture("sm_89", 48, 24, 100 << 10),
    Architecture("sm_90", 64, 32, 228 << 10),
)


@dataclass(frozen=True)
class Usage:
    """What `ptxas -v` says about a kernel."""

    registers: int
    stack: int
    spilled: int
    shared_bytes: int  # static; the dynamic part is an argument of the launch


def parse_ptxas(text: str) -> dict[str, Usage]:
    """Usage by kernel."""
    kernels = {}
    for entry in re.split(r"Compiling entry function '", text)[1:]:
        spill = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        stack, stores, loads = map(int, spill.groups())
        shared = re.search(r"(\d+) bytes smem", entry)
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        kernels[entry.split("'")[0]] = Usage(registers, stack, stores + loads, int(shared[1]) if shared else 0)
    return kernels


def parse_threads(ptx: str) -> dict[str, int]:
    """Threads per block that kernels declare with __launch_bounds__."""
    return {name: int(threads) for name, threads in re.findall(r"\.entry (\w+)\((?:[^{]*?)\.maxntid (\d+)", ptx)}


def parse_sass(text: str) -> dict[str, dict[str, int]]:
    """Instructions of interest by kernel, from nvdisasm's listing."""
    patterns = {"all": r"/\*[0-9a-f]{4,}\*/", "MMA": r"\b[HIQ]MMA\.", "LDSM": r"\bLDSM\b", "LDGSTS": r"\bLDGSTS\b"}
    patterns |= {"LDG.128": r"\bLDG\.E[.\w]*\.128", "STG.128": r"\bSTG\.E[.\w]*\.128", "MUFU": r"\bMUFU\b"}
    kernels = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        name = re.split(r'[,\s"]', section, maxsplit=1)[0]
        kernels[name] = {what: len(re.findall(pattern, section)) for what, pattern in patterns.items()}
    return kernels


def run(*command: str | Path) -> str:
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"cuda_report: `{' '.join(map(str, command))}` failed:\n{result.stderr}")
    return result.stdout + result.stderr


def find_nvdisasm() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in Path(folder).glob("*/bin/nvdisasm"):
            return str(path)
    return shutil.which("nvdisasm")


@dataclass(frozen=True)
class Kernels:
    """All kernels of a source file."""

    source: Path
    threads: dict[str, int]
    usage: dict[str, dict[str, Usage]]  # by architecture
    sass: dict[str, dict[str, int]]


def inspect(source: Path, nvdisasm: str | None) -> Kernels:
    ptx, cubin = WORK / f"{source.stem}.ptx", WORK / f"{source.stem}.cubin"
    run("nvcc", *FLAGS, "-arch=compute_80", "-ptx", source, "-o", ptx)
    usage = {}
    for architecture in reversed(ARCHITECTURES):  # sm_80, whose machine code is read, comes last
        usage[architecture.name] = parse_ptxas(run("ptxas", "-v", f"-arch={architecture.name}", ptx, "-o", cubin))
    sass = parse_sass(run(nvdisasm, cubin)) if nvdisasm else {}
    return Kernels(source, parse_threads(ptx.read_text()), usage, sass)


def readable(name: str) -> str:
    name = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\b(mfx::|router::|expert_layout_kernels::|void )", "", name)


def write_report(files: list[Kernels]) -> str:
    lines = [
        "# CUDA kernels",
        "",
        "Written by `python tools/cuda_report.py`; do not edit. Registers, then resident warps of those a",
        "multiprocessor can hold, by registers, threads and static shared memory; dynamic shared memory (d), an",
        "argument of the launch, may allow fewer. Spills and stack are zero unless a row says otherwise.",
        "",
        "| kernel | threads | shared bytes | " + " | ".join(a.name for a in ARCHITECTURES) + " |",
        "| --- | --- | --- |" + " --- |" * len(ARCHITECTURES),
    ]
    for file in files:
        dynamic = "extern __shared__" in "".join(p.read_text() for p in file.source.parent.glob("*.cu*"))
        for kernel in file.usage["sm_80"]:
            threads = file.threads.get(kernel)
            cells = []
            for architecture in ARCHITECTURES:
                usage = file.usage[architecture.name][kernel]
                cell = str(usage.registers)
                if threads:
                    warps = architecture.resident_warps(usage.registers, threads, usage.shared_bytes)
                    cell += f", {warps}/{architecture.warps}"
                if usage.spilled or usage.stack:
                    cell += f", **stack {usage.stack}, spilled {usage.spilled}**"
                cells.append(cell)
            shared = f"{file.usage['sm_80'][kernel].shared_bytes}{' + d' if dynamic else ''}"
            lines.append(f"| `{readable(kernel)}` | {threads or ''} | {shared} | " + " | ".join(cells) + " |")
    if any(file.sass for file in files):
        columns = ("all", "MMA", "LDSM", "LDGSTS", "LDG.128", "STG.128", "MUFU")
        lines += ["", "SASS for sm_80, instructions in the listing:", "", "| kernel | " + " | ".join(columns) + " |"]
        lines.append("| --- |" + " --- |" * len(columns))
        for file in files:
            for kernel, counts in file.sass.items():
                lines.append(f"| `{readable(kernel)}` | " + " | ".join(str(counts[c]) for c in columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a kernel spills registers")
    check = parser.parse_args().check
    WORK.mkdir(exist_ok=True)
    sources = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))
    nvdisasm = None if check else find_nvdisasm()
    if nvdisasm is None and not check:
        sys.exit("cuda_report: nvdisasm was not found; pip install nvidia-cuda-nvdisasm")
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        files = list(pool.map(lambda source: inspect(source, nvdisasm), sources))
    if not check:
        (ROOT / "docs" / "cuda_report.md").write_text(write_report(files))
    spills = [
        f"{architecture}: {readable(kernel)} spills {usage.spilled} bytes"
        for file in files
        for architecture, kernels in file.usage.items()
        for kernel, usage in kernels.items()
        if usage.spilled
    ]
    print("\n".join(spills) or "cuda_report: no kernel spills registers")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
