"""Gated experts of a package that cannot share our environment: a program for the Python that has the package.

`python served.py KIND PRECISION THREADS FOLDER` reads `gate`, `up` [E, F, D], `down` [E, D, F], `x` [T, D], `ids` and
`weights` [T, K] from FOLDER (`.npy`, float32, ids int32) and says `{}` when it is ready. Every line of its input is a
call: it writes y [T, D] to `y.npy` and says what the call took by its own clocks, `{"cpu": …, "wall": …}`. It ends with
its input. With KIND alone it says the version. Nothing of ours is imported, and torch only where a package needs it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]
Experts = tuple[Callable[[], object], Callable[[], Any]]
"""The timed call, and what gives y [T, D] in float32 after it."""


def kt_kernel(arrays: Arrays, precision: str, threads: int) -> Experts:
    """The kernels that kt-kernel has for this processor."""
    import kt_kernel as package
    import torch

    moe, extension = sys.modules["kt_kernel_ext"].moe, sys.modules["kt_kernel_ext"]
    experts, hidden, width = arrays["gate"].shape
    tokens, slots = arrays["ids"].shape
    pool = extension.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
    worker = extension.CPUInfer(pool)
    weights = {name: torch.from_numpy(arrays[name]).bfloat16() for name in ("gate", "up", "down")}
    elsewhere = torch.zeros(experts, dtype=torch.bool)
    config = moe.MOEConfig(experts, slots, width, hidden, elsewhere.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, worker.backend_, max(tokens, 1024)
    if precision == "bf16":
        for name, tensor in weights.items():
            setattr(config, f"{name}_projs", [[expert.data_ptr() for expert in tensor]])
            setattr(config, f"{name}_scales", [[0] * experts])
        kind = next(found for name in ("AMXBF16_MOE", "AVX2BF16_MOE") if (found := getattr(moe, name, None)))
    else:
        config.save, config.load, config.path = False, False, ""
        for name, tensor in weights.items():
            setattr(config, f"{name}_proj", tensor.data_ptr())
        kind = getattr(moe, "AMXInt8_MOE", None)
        if kind is None:
            raise RuntimeError(f"kt-kernel {package.__version__} has no int8 experts for this processor")
    layer = kind(config)
    order = torch.arange(experts)
    worker.submit(layer.load_weights_task(order.data_ptr()))
    worker.sync()
    x, ids = torch.from_numpy(arrays["x"]).bfloat16(), torch.from_numpy(arrays["ids"]).long()
    gates, y = torch.from_numpy(arrays["weights"]), torch.empty(tokens, width, dtype=torch.bfloat16)
    count = torch.tensor([tokens], dtype=torch.int32)
    pointers = [tensor.data_ptr() for tensor in (ids, gates, x, y)]

    def run() -> object:
        worker.submit(layer.forward_task(count.data_ptr(), slots, *pointers, False))
        worker.sync()
        return weights, order, elsewhere, ids, gates, x  # the package keeps their addresses only

    return run, lambda: y.float().numpy()


_KINDS = {"kt-kernel": kt_kernel}
_VERSIONS = {"kt-kernel": lambda: importlib.metadata.version("kt-kernel")}


def serve(kind: str, precision: str, threads: str, folder: str) -> None:
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # packages print to standard output
    arrays = {path.stem: np.load(path) for path in Path(folder).glob("*.npy")}
    run, result = _KINDS[kind](arrays, precision, int(threads))
    print("{}", file=say, flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        np.save(Path(folder) / "y.npy", result())
        print(json.dumps({"cpu": cpu, "wall": wall}), file=say, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(_VERSIONS[sys.argv[1]]())
    else:
        serve(*sys.argv[1:])
