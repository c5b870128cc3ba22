"""Freed memory in the C library: kept within a stage, given back between stages."""

import ctypes
import os
from typing import Any

#: Buffers up to this size, and as much free memory as this, the C library keeps.
KEPT_BYTES = 2**28
#: Options of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def _glibc() -> Any | None:
    """The C library if it is glibc."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (other C libraries lack it)
    except (OSError, AttributeError, TypeError):
        return None
    return library


def keep_freed_memory() -> bool:
    """Tells glibc to keep large buffers that are freed for the next of their kind; returns whether it did.

    XLA's CPU backend allocates its temporary buffers anew for every call of a program. By default glibc maps those of
    32 MiB and more for each and unmaps them, and every page of them is a page fault. An environment that sets these
    limits itself is left alone.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    library = _glibc()
    options = (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
    return library is not None and all(library.mallopt(option, KEPT_BYTES) == 1 for option in options)


def give_back_freed_memory() -> None:
    """Returns the freed memory of all heaps to the kernel: what one stage needed is not held through the next."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)
