import ctypes
import hashlib
import os
import shutil
import subprocess

import numpy as np
import pytest

import cudasim

HERE = os.path.dirname(os.path.abspath(__file__))


def find_nvcc():
    for c in (os.environ.get("NVCC"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if c and os.path.exists(c):
            return c
    return None


def compile_cuda(source, arch="80", flags=()):
    """Compiles tests/<source> for one architecture, cached by content."""
    nvcc = find_nvcc()
    if not nvcc:
        pytest.skip("nvcc not found")
    path = os.path.join(HERE, source)
    key = hashlib.sha256(open(path, "rb").read() + repr((arch, flags)).encode()).hexdigest()[:16]
    out_dir = os.path.join(os.path.dirname(cudasim.library_path()), "tests")
    os.makedirs(out_dir, exist_ok=True)
    out = os.path.join(out_dir, "%s-%s.so" % (os.path.splitext(source)[0], key))
    if not os.path.exists(out):
        cmd = [
            nvcc,
            "-std=c++17",
            "-O2",
            "-shared",
            "-Xcompiler",
            "-fPIC",
            "-cudart",
            "shared",
            "-gencode",
            "arch=compute_%s,code=compute_%s" % (arch, arch),
            *flags,
            path,
            "-o",
            out + ".tmp",
        ]
        r = subprocess.run(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert r.returncode == 0, r.stdout[-4000:]
        os.rename(out + ".tmp", out)
    cudasim.lib()  # loaded first, so that it satisfies the library's libcudart.so.13
    return ctypes.CDLL(out)


class Buffer:
    """Device memory initialised from an array."""

    def __init__(self, array):
        self.array = np.ascontiguousarray(array)
        self.ptr = cudasim.malloc(max(self.array.nbytes, 1))
        ctypes.memmove(self.ptr, self.array.ctypes.data, self.array.nbytes)
        self._as_parameter_ = ctypes.c_void_p(self.ptr)

    def get(self):
        out = np.empty_like(self.array)
        ctypes.memmove(out.ctypes.data, self.ptr, out.nbytes)
        return out

    def __del__(self):
        cudasim.free(self.ptr)


def to_bf16(x):
    """Round to nearest even, as uint16."""
    u = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    r = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(np.asarray(x, np.float32)), np.uint16(0x7FFF), r)


def from_bf16(u):
    return (np.asarray(u, np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(autouse=True)
def clean_state():
    cudasim.clear_fault()
    cudasim.reset_races()
    cudasim.reset_stats()
    cudasim.set_race_mode(1)
    cudasim.set_strict(1)
    cudasim.set_seed(0)
    cudasim.set_threads(1)
    yield
    cudasim.clear_fault()
