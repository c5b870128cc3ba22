"""Memory of the device that work runs on, of which parts are set aside for one purpose or another."""

import ctypes
import os

import jax

#: What the solver may use unless told: a quarter of an accelerator, of a CPU so many MiB.
SOLVER_SHARE, SOLVER_CPU_MIB = 4, 512
#: Buffers up to this size, and as much free memory as this, the C library keeps.
KEPT_BYTES = 2**28
#: Options of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def share_mib(share: int, cpu: int) -> int:
    """MiB of a `share`-th of the device's memory, at least `cpu`; `cpu` on a CPU or where it is not known.

    A power of two: processes whose devices differ a little must come to the same.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    return cpu if limit is None else max(cpu, 2 ** ((limit // share // 2**20).bit_length() - 1))


def solver_mib(given: int | None) -> int:
    """`alignment.memory_mib`, or what it is unless given."""
    return given or share_mib(SOLVER_SHARE, SOLVER_CPU_MIB)


def keep_freed_memory() -> bool:
    """Tells glibc to keep large buffers that are freed for the next of their kind; returns whether it did.

    XLA's CPU backend allocates its temporary buffers anew for every call of a program. By default glibc maps those of
    32 MiB and more for each and unmaps them, and every page of them is a page fault. An environment that sets these
    limits itself is left alone.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (other C libraries lack it)
        return all(library.mallopt(option, KEPT_BYTES) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
    except (OSError, AttributeError, TypeError):
        return False
