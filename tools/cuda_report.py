"""Writes docs/cuda_report.md: what ptxas makes of every CUDA kernel on each architecture, no GPU needed.

    python tools/cuda_report.py            the report
    python tools/cuda_report.py --check    only fail if a kernel spills registers, uses local memory, lacks the
                                           instructions that it is meant to have, or if ptxas serialises wgmma

PTX is compiled once per source (compute_80), then assembled for each architecture, so that the figures are those of the
code that runs there just in time or from a build for it. *_sm90_cuda.cu are compiled for sm_90a alone, where CUTLASS is
found (MFX_CUTLASS_DIR, or the package nvidia-cutlass). SASS is read with nvdisasm (PyPI: nvidia-cuda-nvdisasm).
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
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Icsrc", "-Iinclude"]
FLAGS += ['-DMFX_CUDA_ARCHS=""']


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
    """Usage by kernel, with the functions that were not inlined into it: each has a line of its own."""
    kernels = {}
    for entry in re.split(r"Compiling entry function '", text)[1:]:
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        stack, stores, loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
        shared = re.search(r"(\d+) bytes smem", entry)
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        kernels[entry.split("'")[0]] = Usage(registers, stack, stores + loads, int(shared[1]) if shared else 0)
    return kernels


def parse_threads(ptx: str) -> dict[str, int]:
    """Threads per block that kernels declare with __launch_bounds__."""
    return {name: int(threads) for name, threads in re.findall(r"\.entry (\w+)\((?:[^{]*?)\.maxntid (\d+)", ptx)}


# Machine instructions that kernels are meant to have, by pattern of their names: tensor-core products, matrix loads of
# shared memory, asynchronous copies, and 16-byte accesses to global memory.
EXPECTED = (
    (r"stick_(fwd|bwd_query|bwd_key)_", ("MMA", "LDGSTS", "STG.128")),
    (r"stick_(fwd|bwd_query|bwd_key)_\w+_sm80", ("LDSM",)),
    (r"stick_\w+_sm90a", ("HGMMA",)),
    (r"stick_bwd_lengths_", ("LDG.128",)),
    (r"stick_decode", ("LDG.128",)),
    (r"grouped_\w+_grad_\w+|grouped_forward_\w+", ("MMA",)),
    (r"grouped_(forward|input_grad|hidden_grad)_\w+_sm80", ("LDSM",)),
    (r"grouped_\w+_\d+x\d+_sm(80|90a)", ("LDGSTS",)),
    (r"grouped_\w+_sm90a", ("HGMMA",)),
    (r"grouped_(forward|input_grad|hidden_grad)_\w+_sm90a", ("UTMALDG",)),
    (r"grouped_(forward|input_grad)_\w+?_\d+x\d+_sm80", ("STG.128",)),
    (r"quantised_\w+_sm80", ("MMA", "LDSM", "LDGSTS")),
    (r"quantised_\w+_\d+x\d+_sm80", ("STG.128",)),
    (r"route_topk_(forward|backward_tokens|backward_weights)", ("MMA", "LDGSTS")),
    (r"route_topk_(forward|backward_tokens|backward_weights<BFloat16)", ("LDSM",)),
)


def missing_instructions(kernel: str, counts: dict[str, int]) -> list[str]:
    """What a kernel ought to have and has not, by its readable name; local memory is what none ought to have."""
    wanted = {what for pattern, instructions in EXPECTED if re.match(pattern, kernel) for what in instructions}
    found = [f"no {what}" for what in sorted(wanted) if not counts[what]]
    return found + [f"{counts[what]} {what}" for what in ("LDL", "STL") if counts[what]]


def main_loop(section: str) -> tuple[int, int]:
    """Instructions, and tensor-core products among them, of the innermost loop with the most products; 0, 0 if none."""
    labels: dict[str, int] = {}
    products = [0]  # before each instruction
    loops = []
    for line in section.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(products) - 1
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line):
            products.append(products[-1] + bool(re.search(SASS_PATTERNS["MMA"], line)))
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if branch and branch[1] in labels:
                begin, end = labels[branch[1]], len(products) - 1
                loops.append((products[end] - products[begin], begin - end))
    most, size = max(loops, default=(0, 0))
    return (-size, most) if most else (0, 0)


SASS_PATTERNS = {
    "all": r"/\*[0-9a-f]{4,}\*/",
    "MMA": r"\b(?:[HIQ]|HG)MMA\.",
    "HGMMA": r"\bHGMMA\.",
    "UTMALDG": r"\bUTMALDG\b",
    "LDSM": r"\bLDSM\b",
    "LDGSTS": r"\bLDGSTS\b",
    "LDG.128": r"\bLDG\.E[.\w]*\.128",
    "STG.128": r"\bSTG\.E[.\w]*\.128",
    "MUFU": r"\bMUFU\b",
    "LDL": r"\bLDL\b",
    "STL": r"\bSTL\b",
}


def parse_sass(text: str) -> dict[str, dict[str, int]]:
    """Instructions of interest by kernel, from nvdisasm's listing."""
    kernels = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        name = re.split(r'[,\s"]', section, maxsplit=1)[0]
        kernels[name] = {what: len(re.findall(pattern, section)) for what, pattern in SASS_PATTERNS.items()}
        kernels[name]["loop"], kernels[name]["loop MMA"] = main_loop(section)
    return kernels


def run(*command: str | Path) -> str:
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"cuda_report: `{' '.join(map(str, command))}` failed:\n{result.stderr}")
    if "C7510" in result.stderr:  # assert() calls do this where NDEBUG is not defined
        sys.exit(f"cuda_report: `{' '.join(map(str, command))}` serialises wgmma:\n{result.stderr}")
    return result.stdout + result.stderr


def find_nvdisasm() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in Path(folder).glob("*/bin/nvdisasm"):
            return str(path)
    return shutil.which("nvdisasm")


def find_cutlass() -> Path | None:
    """The folder of CUTLASS's headers, as cmake/MfxCutlass.cmake finds it."""
    folders = []
    if given := os.environ.get("MFX_CUTLASS_DIR"):
        folders = [Path(given) / "include", Path(given)]
    elif spec := importlib.util.find_spec("cutlass_library"):
        folders = [Path(folder) / "source" / "include" for folder in spec.submodule_search_locations or []]
    return next((folder for folder in folders if (folder / "cute/arch/mma_sm90_gmma.hpp").exists()), None)


@dataclass(frozen=True)
class Kernels:
    """All kernels of a source file."""

    source: Path
    threads: dict[str, int]
    usage: dict[str, dict[str, Usage]]  # by architecture
    sass: dict[str, dict[str, int]]
    sizes: dict[str, int]  # bytes of machine code by architecture, and of PTX


def on_sm90a_alone(source: Path) -> bool:
    return source.name.endswith("_sm90_cuda.cu")


def inspect(source: Path, nvdisasm: str) -> Kernels:
    ptx, cubin = WORK / f"{source.stem}.ptx", WORK / f"{source.stem}.cubin"
    if on_sm90a_alone(source):
        run("nvcc", *FLAGS, f"-I{find_cutlass()}", "-arch=compute_90a", "-ptx", source, "-o", ptx)
        assembled = {"sm_90": "sm_90a"}
    else:
        run("nvcc", *FLAGS, "-arch=compute_80", "-ptx", source, "-o", ptx)
        # sm_80, whose machine code is read, comes last.
        assembled = {architecture.name: architecture.name for architecture in reversed(ARCHITECTURES)}
    usage, sizes = {}, {"PTX": ptx.stat().st_size}
    for name, target in assembled.items():
        usage[name] = parse_ptxas(run("ptxas", "-v", f"-arch={target}", ptx, "-o", cubin))
        sizes[name] = cubin.stat().st_size
    sass = parse_sass(run(nvdisasm, cubin))
    return Kernels(source, parse_threads(ptx.read_text()), usage, sass, sizes)


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
        for kernel, first in next(iter(file.usage.values())).items():
            threads = file.threads.get(kernel)
            cells = []
            for architecture in ARCHITECTURES:
                if architecture.name not in file.usage:
                    cells.append("")
                    continue
                usage = file.usage[architecture.name][kernel]
                cell = str(usage.registers)
                if threads:
                    warps = architecture.resident_warps(usage.registers, threads, usage.shared_bytes)
                    cell += f", {warps}/{architecture.warps}"
                if usage.spilled or usage.stack:
                    cell += f", **stack {usage.stack}, spilled {usage.spilled}**"
                cells.append(cell)
            shared = f"{first.shared_bytes}{' + d' if dynamic else ''}"
            lines.append(f"| `{readable(kernel)}` | {threads or ''} | {shared} | " + " | ".join(cells) + " |")
    if files:
        names = {architecture.name: f"machine code for {architecture.name}" for architecture in ARCHITECTURES}
        sizes = [
            f"{sum(file.sizes.get(name, 0) for file in files) / 2**20:.1f} MiB of {what}"
            for name, what in (names | {"PTX": "PTX"}).items()
        ]
        lines += ["", f"All kernels together are {', '.join(sizes)}, before compression."]
        columns = ("all", "MMA", "LDSM", "LDGSTS", "LDG.128", "STG.128", "MUFU", "loop", "loop MMA")
        lines += ["", "SASS for sm_80, of kernels named *_sm90a for that: instructions in the listing, then those of"]
        lines += ["the loop with the most tensor-core"]
        lines += ["products (all paths through it) and these products.", "", "| kernel | " + " | ".join(columns) + " |"]
        lines.append("| --- |" + " --- |" * len(columns))
        for file in files:
            for kernel, counts in file.sass.items():
                lines.append(f"| `{readable(kernel)}` | " + " | ".join(str(counts[c]) for c in columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a kernel is not as it should be")
    check = parser.parse_args().check
    WORK.mkdir(exist_ok=True)
    sources = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))
    if find_cutlass() is None:
        print("cuda_report: the sm_90a kernels are left out, there is no CUTLASS (docs/build.md)", file=sys.stderr)
        sources = [source for source in sources if not on_sm90a_alone(source)]
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
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
    unlike = [
        f"{readable(kernel)} has {', '.join(missing)}"
        for file in files
        for kernel, counts in file.sass.items()
        if (missing := missing_instructions(readable(kernel), counts))
    ]
    print("\n".join(spills + unlike) or "cuda_report: no kernel spills registers, and each has its instructions")
    return 1 if spills or unlike else 0


if __name__ == "__main__":
    sys.exit(main())
