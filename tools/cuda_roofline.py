"""Writes docs/cuda_roofline.md: a MODEL of the steady state of the CUDA kernels' main loops, no GPU needed.

    python tools/cuda_roofline.py           needs nvcc, nvdisasm and a build with CUDA kernels (docs/build.md)
    python tools/cuda_roofline.py --again   with the machine code and counts that the last run left in build-ptxas/

The page says how. The parts: roofline/machines.py (rates and their sources), sass.py (listings, loops, paths), units.py
(instructions to cycles), latency.py (one warp's time), machine_code.py (compiles), emulated.py (counts), model.py (the
arithmetic), ops.py (shapes, published figures), page.py.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
from typing import Any

import cuda_report
from roofline.machine_code import Compiled, compile_kernel, plain
from roofline.machines import GPUS
from roofline.model import Kernel
from roofline.page import page

DOCUMENT = cuda_report.ROOT / "docs" / "cuda_roofline.md"
KEPT = cuda_report.WORK / "roofline.pickle"


def counts(arch: str) -> dict[str, Any]:
    """What the emulated device of an architecture executes."""
    path = cuda_report.WORK / f"roofline_sm{arch}.json"
    path.unlink(missing_ok=True)
    command = [cuda_report.ROOT / "tools/emulated.sh", sys.executable, "--run", "tools/roofline/emulated.py", path]
    environment = os.environ | {"CUDASIM_ARCH": arch, "CUDASIM_RACE": "0", "CUDASIM_UNINIT": "0"}
    subprocess.run(list(map(str, command)), env=environment, check=True, cwd=cuda_report.ROOT)
    if not path.exists():
        sys.exit("cuda_roofline: this build has no CUDA kernels (docs/build.md)")
    return json.loads(path.read_text())


def collect() -> tuple[dict[str, Any], dict[tuple[str, str], Compiled]]:
    """Counts by the emulated device's architecture, machine code by kernel and target."""
    if cuda_report.find_nvdisasm() is None:
        sys.exit("cuda_roofline: nvdisasm was not found; pip install nvidia-cuda-nvdisasm")
    cuda_report.WORK.mkdir(exist_ok=True)
    counted = {arch: counts(arch) for arch in ("80", "90")}
    compiled = {}
    for gpu in GPUS:
        for call in counted[emulated_as(gpu.target)].values():
            key = (plain(call["kernel"]), gpu.target)
            if key not in compiled:
                compiled[key] = compile_kernel(*key, call["tile"])
                print(*key, flush=True)
    return counted, compiled


def emulated_as(target: str) -> str:
    """Hopper's own kernels run on Hopper alone."""
    return "90" if target == "sm_90" else "80"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="compile and count nothing, only write the page")
    if parser.parse_args().again:
        counted, compiled = pickle.loads(KEPT.read_bytes())
    else:
        counted, compiled = collect()
        KEPT.write_bytes(pickle.dumps((counted, compiled)))
    kernels = {}
    for gpu in GPUS:
        kernels[gpu.name] = {}
        for name, call in counted[emulated_as(gpu.target)].items():
            kernel = plain(call["kernel"])
            code = compiled[kernel, gpu.target]
            shape = call["threads"], call["shared_bytes"], call["blocks_per_unit"]
            kernels[gpu.name][name] = Kernel(
                kernel, code.registers, *shape, code.main, code.copying, call["tile"], call["unit"]
            )
    DOCUMENT.write_text(page(kernels))


if __name__ == "__main__":
    main()
