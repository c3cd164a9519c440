"""Python bindings of the CUDA emulator (standard library only).

    import cudasim
    m = cudasim.Module(open("kernel.ptx").read())
    m.function("add").launch((4, 1, 1), (128, 1, 1), [ptr_a, ptr_b, ctypes.c_int(n)], smem=0)

Arguments are ctypes values or plain ints and floats; plain ones take the size
the kernel declares (a float for a 4-byte parameter is passed as f32). Device
pointers are host addresses: pass tensor.data_ptr() or array.ctypes.data.
"""

import contextlib
import ctypes
import json
import os
import struct
import subprocess
import types

_HERE = os.path.dirname(os.path.abspath(__file__))


class CudaSimError(RuntimeError):
    def __init__(self, code, text):
        super().__init__(text or f"CUDA error {code}")
        self.code = code


def library_path():
    """Path of the emulated libcudart, built when needed."""
    path = os.environ.get("CUDASIM_LIB")
    if path and os.path.exists(path):
        return path
    out = subprocess.run([os.path.join(_HERE, "run")], check=True, stdout=subprocess.PIPE, text=True)
    return os.path.join(out.stdout.strip(), "libcudart.so.13")


_lib = None


def lib():
    global _lib
    if _lib is None:
        _lib = ctypes.CDLL(library_path(), mode=ctypes.RTLD_GLOBAL)
        p, u32p = ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32)
        _lib.cudasim_register.argtypes = [p, ctypes.c_size_t, ctypes.c_char_p]
        _lib.cudasim_unregister.argtypes = [p]
        _lib.cudasim_malloc.argtypes = [ctypes.c_size_t]
        _lib.cudasim_malloc.restype = p
        _lib.cudasim_free.argtypes = [p]
        _lib.cudasim_stats_json.restype = ctypes.c_char_p
        _lib.cudasim_last_fault.restype = ctypes.c_char_p
        _lib.cudasim_race_count.restype = ctypes.c_uint64
        _lib.cudasim_last_report.restype = ctypes.c_char_p
        _lib.cudasim_restore.restype = ctypes.c_uint64
        _lib.cudasim_set_seed.argtypes = [ctypes.c_uint64]
        _lib.cudasim_capture_end.argtypes = [ctypes.POINTER(p)]
        _lib.cudasim_graph_launch.argtypes = [p]
        _lib.cudasim_graph_destroy.argtypes = [p]
        _lib.cudasim_module_load.argtypes = [ctypes.c_char_p]
        _lib.cudasim_module_load.restype = p
        _lib.cudasim_module_unload.argtypes = [p]
        _lib.cudasim_kernel_params.argtypes = [p, ctypes.c_char_p, u32p, ctypes.c_int]
        _lib.cudasim_launch.argtypes = [
            p,
            ctypes.c_char_p,
            u32p,
            u32p,
            u32p,
            ctypes.c_uint32,
            ctypes.POINTER(p),
            ctypes.c_int,
        ]
        _lib.cudasim_module_symbol.argtypes = [p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t)]
        _lib.cudasim_module_symbol.restype = p
    return _lib


def _torch_allocator():
    import torch  # noqa: F401  brings the libraries that the allocator is linked to

    return ctypes.CDLL(os.path.join(os.path.dirname(library_path()), "libcudasim_torch.so"))


def use_torch_allocator():
    """Makes every CPU tensor of torch a device allocation: exact bounds, poisoned contents (`make torch` builds it)."""
    _torch_allocator().cudasim_use_torch_allocator()


class Graph:
    """Work that capture() recorded."""

    def __init__(self):
        self._handle = ctypes.c_void_p()

    def replay(self):
        code = lib().cudasim_graph_launch(self._handle)
        if code:
            raise CudaSimError(code, last_fault())

    def close(self):
        """Also frees what tensors freed during the capture."""
        lib().cudasim_graph_destroy(self._handle)
        _torch_allocator().cudasim_release_held()
        self._handle = ctypes.c_void_p()


@contextlib.contextmanager
def capture():
    """Records what its body submits to the legacy stream into a Graph, instead of running it. Only that: what torch
    computes on the CPU meanwhile happens at once and is not part of the graph. Memory of tensors that the body frees is
    kept until the graph is closed. Needs use_torch_allocator()."""
    allocator, graph = _torch_allocator(), Graph()
    code = lib().cudasim_capture_begin()
    if code:
        raise CudaSimError(code, "a capture is under way")
    allocator.cudasim_hold_freed(1)
    try:
        yield graph
    finally:
        allocator.cudasim_hold_freed(0)
        code = lib().cudasim_capture_end(ctypes.byref(graph._handle))
    if code:
        lib().cudaGetLastError()  # or the next launch would report it
        raise CudaSimError(code, "a call that captures do not allow")


def register(ptr, nbytes, name="registered"):
    lib().cudasim_register(ptr, nbytes, name.encode())


def unregister(ptr):
    lib().cudasim_unregister(ptr)


def malloc(nbytes):
    """Device memory, poisoned with 0xff bytes."""
    return lib().cudasim_malloc(nbytes)


def free(ptr):
    lib().cudasim_free(ptr)


def stats():
    """Statistics of every launch since reset_stats(), as a list of dicts."""
    return json.loads(lib().cudasim_stats_json())


def reset_stats():
    lib().cudasim_reset_stats()


def last_fault():
    return lib().cudasim_last_fault().decode(errors="replace")


def clear_fault():
    lib().cudasim_clear_fault()


def race_count():
    return lib().cudasim_race_count()


def reset_races():
    lib().cudasim_reset_races()


def last_report():
    """Text of the last race, missing wait or uninitialised read."""
    return lib().cudasim_last_report().decode(errors="replace")


def set_race_mode(mode):
    """0 off, 1 report, 2 fail the launch; returns the mode before."""
    return lib().cudasim_set_race_mode(mode)


def set_uninit(on):
    """Report reads of shared memory that was never written; returns the setting before."""
    return bool(lib().cudasim_set_uninit(int(on)))


@contextlib.contextmanager
def expect_clean(uninit=False):
    """Raises CudaSimError if a launch in its body makes a report: a race, a missing
    wait, with `uninit` also a read of shared memory that was never written."""
    mode = set_race_mode(1)
    if not mode:
        set_race_mode(0)
        raise ValueError("expect_clean needs the race detector (CUDASIM_RACE is 0)")
    set_race_mode(mode)
    before, old = race_count(), set_uninit(True) if uninit else None
    try:
        yield
    finally:
        if uninit:
            set_uninit(old)
    n = race_count()
    n -= before if n >= before else 0  # reset_races() in the body
    if n:
        raise CudaSimError(719, f"{n} report{'s' if n > 1 else ''}; the last one: {last_report()}")


def set_strict(mode):
    lib().cudasim_set_strict(mode)


def set_seed(seed):
    lib().cudasim_set_seed(seed)


def set_slice(n):
    lib().cudasim_set_slice(n)


def set_race_global(on):
    lib().cudasim_set_race_global(int(on))


def set_race_warp(on):
    lib().cudasim_set_race_warp(int(on))


def set_tensor_truncate(on):
    """Whether tensor cores truncate their sums, as hardware does; returns the setting before."""
    return bool(lib().cudasim_set_tensor_truncate(int(on)))


def set_approx_error(on):
    """Whether ex2.approx and the like err within what is documented for them; returns the setting before."""
    return bool(lib().cudasim_set_approx_error(int(on)))


def set_multiprocessors(n):
    """How many the device says it has, 0 being as many as the product; returns the setting before."""
    return lib().cudasim_set_multiprocessors(n)


def count_instructions(kernel, opcode):
    """Instructions of a registered kernel whose opcode begins with `opcode`."""
    n = lib().cudasim_drop(kernel.encode(), opcode.encode(), -1)
    if n < 0:
        raise ValueError(f"no kernel named {kernel} is registered")
    return n


@contextlib.contextmanager
def dropped(kernel, opcode, index):
    """In its body one such instruction does nothing: is what it guards against caught? What it gives has
    ``reached``, how often a warp came by, once the body has ended."""
    n = count_instructions(kernel, opcode)
    if not 0 <= index < n:
        raise IndexError(f"{kernel} has {n} instructions {opcode}, asked for index {index}")
    lib().cudasim_drop(kernel.encode(), opcode.encode(), index)
    found = types.SimpleNamespace(reached=0)
    try:
        yield found
    finally:
        found.reached = lib().cudasim_restore()


def set_threads(n):
    lib().cudasim_set_threads(n)


def _dim(v):
    v = (v,) if isinstance(v, int) else tuple(v)
    v = v + (1,) * (3 - len(v))
    return (ctypes.c_uint32 * 3)(*v)


class Function:
    def __init__(self, module, name):
        self.module, self.name = module, name.encode()
        sizes = (ctypes.c_uint32 * 256)()
        n = lib().cudasim_kernel_params(module.handle, self.name, sizes, 256)
        if n < 0:
            raise CudaSimError(98, last_fault())
        self.param_sizes = list(sizes[:n])

    def _pack(self, value, size):
        if isinstance(value, (ctypes._SimpleCData, ctypes.Structure, ctypes.Array)):
            raw = bytes(value)
            if len(raw) != size:
                raise TypeError(f"argument has {len(raw)} bytes, the parameter {size}")
        elif isinstance(value, (bytes, bytearray)):
            raw = bytes(value)
        elif isinstance(value, float):
            raw = struct.pack("<f" if size == 4 else "<d", value)
        elif value is None:
            raw = bytes(size)
        else:
            raw = (int(value) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
        return ctypes.create_string_buffer(raw, size)

    def launch(self, grid, block, args, smem=0, cluster=None, cooperative=False):
        if len(args) != len(self.param_sizes):
            raise TypeError(f"{self.name.decode()} takes {len(self.param_sizes)} arguments, not {len(args)}")
        bufs = [self._pack(a, s) for a, s in zip(args, self.param_sizes, strict=True)]
        ptrs = (ctypes.c_void_p * (len(bufs) + 1))(*[ctypes.addressof(b) for b in bufs])
        lib().cudasim_clear_fault()
        code = lib().cudasim_launch(
            self.module.handle,
            self.name,
            _dim(grid),
            _dim(block),
            _dim(cluster) if cluster else None,
            smem,
            ptrs,
            int(cooperative),
        )
        if code:
            raise CudaSimError(code, last_fault())


class Module:
    """A PTX module loaded from text."""

    def __init__(self, ptx):
        self.handle = lib().cudasim_module_load(ptx.encode() if isinstance(ptx, str) else ptx)
        if not self.handle:
            raise CudaSimError(218, last_fault())

    def function(self, name):
        return Function(self, name)

    def symbol(self, name):
        """(address, bytes) of a module variable."""
        n = ctypes.c_size_t()
        a = lib().cudasim_module_symbol(self.handle, name.encode(), ctypes.byref(n))
        if not a:
            raise KeyError(name)
        return a, n.value

    def close(self):
        if self.handle:
            lib().cudasim_module_unload(self.handle)
            self.handle = None
