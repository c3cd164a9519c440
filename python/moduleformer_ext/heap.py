"""glibc's heap, told to keep what it has."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
"""malloc.h's names of what mallopt sets."""


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
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        if one_arena:
            libc.mallopt(M_ARENA_MAX, 1)
