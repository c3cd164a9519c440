"""Gated experts of a package that cannot share our environment: a program for the Python that has the package.

`python served.py KIND PRECISION THREADS FOLDER` reads `gate`, `up` [E, F, D], `down` [E, D, F], `x` [T, D], `ids` and
`weights` [T, K] from FOLDER (`.npy`, float32, ids int32) and says `{}` when it is ready. Every line of its input is a
call: it writes y [T, D] to `y.npy` and says what the call took by its own clocks, `{"cpu": …, "wall": …}`. It ends with
its input. With KIND alone it says the version. Nothing of ours is imported, and torch only where a package needs it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
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

_GGML_TYPES = {"fp32": 0, "q4_0": 2, "q8_0": 8, "bf16": 30}
_GGML_INT32 = 26
_GGML_TENSORS = 64


class _GgmlParameters(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Ggml:
    """The functions of ggml and of its CPU backend, as they lie in llama-cpp-python."""

    def __init__(self) -> None:
        self._libraries = [ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in self._files()]

    @staticmethod
    def _files() -> list[Path]:
        folder = os.environ.get("GGML_LIBRARIES")
        if folder is None:
            spec = importlib.util.find_spec("llama_cpp")
            if spec is None or spec.origin is None:
                raise ImportError(f"{sys.executable} has no llama_cpp, and GGML_LIBRARIES names no folder")
            folder = str(Path(spec.origin).parent / "lib")
        return [Path(folder) / f"lib{name}.so" for name in ("ggml-base", "ggml-cpu", "ggml")]

    def __call__(self, name: str, *arguments: Any, returns: Any = ctypes.c_void_p) -> Any:
        """`arguments` are pointers unless they have a type of ctypes."""
        function = next(getattr(library, name) for library in self._libraries if hasattr(library, name))
        function.restype = returns
        return function(*(ctypes.c_void_p(word) if isinstance(word, int) else word for word in arguments))

    def context(self) -> int:
        size = _GGML_TENSORS * self("ggml_tensor_overhead", returns=ctypes.c_size_t)
        size += self("ggml_graph_overhead", returns=ctypes.c_size_t)
        context: int = self("ggml_init", _GgmlParameters(size, None, True))
        return context

    def tensor(self, context: int, kind: int, *shape: int) -> int:
        """The last dimension of `shape` is contiguous."""
        sizes = [ctypes.c_int64(size) for size in reversed(shape)]
        made: int = self(f"ggml_new_tensor_{len(shape)}d", context, ctypes.c_int(kind), *sizes)
        return made

    def fill(self, tensor: int, values: Any) -> None:
        data = values.ctypes.data_as(ctypes.c_void_p)
        self("ggml_backend_tensor_set", tensor, data, ctypes.c_size_t(0), ctypes.c_size_t(values.nbytes), returns=None)

    def packed(self, kind: int, values: Any) -> Any:
        """The bytes of `values` in a type of ggml."""
        rows, columns = values.size // values.shape[-1], values.shape[-1]
        row_bytes = self("ggml_row_size", ctypes.c_int(kind), ctypes.c_int64(columns), returns=ctypes.c_size_t)
        out = np.empty(rows * row_bytes, np.uint8)
        source, target = (array.ctypes.data_as(ctypes.c_void_p) for array in (values, out))
        sizes = [ctypes.c_int64(size) for size in (0, rows, columns)]
        self("ggml_quantize_chunk", ctypes.c_int(kind), source, target, *sizes, None, returns=ctypes.c_size_t)
        return out


def ggml(arrays: Arrays, precision: str, threads: int) -> Experts:
    """The graph that llama.cpp makes of such experts, its weights in the buffer that llama.cpp would choose."""
    call, kind = _Ggml(), _GGML_TYPES[precision]
    (tokens, width), slots = arrays["x"].shape, arrays["ids"].shape[1]
    backend = call("ggml_backend_cpu_init")
    call("ggml_backend_cpu_set_n_threads", backend, ctypes.c_int(threads), returns=None)
    registry = call("ggml_backend_cpu_reg")
    device = call("ggml_backend_reg_dev_get", registry, ctypes.c_size_t(0))

    inputs = call.context()
    x = call.tensor(inputs, _GGML_TYPES["fp32"], tokens, 1, width)
    ids = call.tensor(inputs, _GGML_INT32, tokens, slots)
    gates = call.tensor(inputs, _GGML_TYPES["fp32"], tokens, slots, 1)
    call("ggml_backend_alloc_ctx_tensors", inputs, backend)
    for tensor, name in (x, "x"), (ids, "ids"), (gates, "weights"):
        call.fill(tensor, arrays[name])

    def product(work: int, weight: int, rows: int) -> int:
        made: int = call("ggml_mul_mat_id", work, weight, rows, ids)
        return made

    def placed(buffer_type: int) -> dict[str, int] | None:
        """The weights in a kind of buffer, None where it has no product for their type."""
        context = call.context()
        weights = {name: call.tensor(context, kind, *arrays[name].shape) for name in ("gate", "up", "down")}
        call("ggml_backend_alloc_ctx_tensors_from_buft", context, buffer_type)
        trial = product(call.context(), weights["up"], x)
        served = call("ggml_backend_dev_supports_op", device, trial, returns=ctypes.c_bool)
        return weights if served else None

    plain = call("ggml_backend_get_default_buffer_type", backend)
    extra = call("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
    array_of = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(extra)(device)
    kinds: list[int] = []
    while array_of and array_of[len(kinds)]:
        kinds.append(array_of[len(kinds)] or 0)
    weights = next(filter(None, map(placed, [*kinds, plain])))
    for name, tensor in weights.items():
        call.fill(tensor, call.packed(kind, arrays[name]))

    work = call.context()
    hidden = call("ggml_swiglu_split", work, product(work, weights["gate"], x), product(work, weights["up"], x))
    rows = call("ggml_mul", work, product(work, weights["down"], hidden), gates)
    stride = ctypes.c_size_t(4 * width * slots)
    views = [
        call(
            "ggml_view_2d",
            *(work, rows, ctypes.c_int64(width), ctypes.c_int64(tokens), stride, ctypes.c_size_t(4 * width * slot)),
        )
        for slot in range(slots)
    ]
    y = views[0]
    for view in views[1:]:
        y = call("ggml_add", work, y, view)
    graph = call("ggml_new_graph", work)
    call("ggml_build_forward_expand", graph, y, returns=None)
    call("ggml_backend_alloc_ctx_tensors", work, backend)

    def run() -> None:
        if status := call("ggml_backend_graph_compute", backend, graph, returns=ctypes.c_int):
            raise RuntimeError(f"ggml_backend_graph_compute gave {status}")

    def result() -> Any:
        out = np.empty((tokens, width), np.float32)
        target = out.ctypes.data_as(ctypes.c_void_p)
        call("ggml_backend_tensor_get", y, target, ctypes.c_size_t(0), ctypes.c_size_t(out.nbytes), returns=None)
        return out

    return run, result


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


def _ggml_version() -> str:
    said: bytes = _Ggml()("ggml_version", returns=ctypes.c_char_p)
    return said.decode()


_KINDS = {"ggml": ggml, "kt-kernel": kt_kernel}
_VERSIONS = {"ggml": _ggml_version, "kt-kernel": lambda: importlib.metadata.version("kt-kernel")}


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
