"""glibc's heap, told to keep what it has, or not to."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8


def glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc, which alone has these switches."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory(*, one_arena: bool = False) -> None:
    """Reuse freed memory for later allocations instead of giving it back to the system.

    A step frees and allocates the same large activations over and over. By default glibc maps each of them
    afresh, and the page faults of touching zeroed memory cost about a tenth of a training step, and more of an op
    that is timed by itself. `one_arena`: all threads share one heap, so that what one has freed serves the others.
    No effect where the C library is another.
    """
    if (libc := glibc()) is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
        if one_arena:
            libc.mallopt(_M_ARENA_MAX, 1)


@contextmanager
def give_freed_memory_back() -> Iterator[None]:
    """What a process has that says nothing to glibc, once its large tensors have come and gone: those of 32 MiB and
    more are mapped afresh each time. Freed memory is kept again afterwards.
    """
    if (libc := glibc()) is not None:
        libc.mallopt(_M_MMAP_MAX, 65536)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)
    try:
        yield
    finally:
        keep_freed_memory()
