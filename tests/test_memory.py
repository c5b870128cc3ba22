"""Freed memory stays with the process: large buffers cost no page faults from the second of their kind on."""

import os
import platform
import subprocess
import sys

import pytest

#: Page faults of ten buffers of 48 MiB, one after the other, each written to.
PROGRAM = """
import ctypes, resource, sys
from tmjax.allocator import keep_freed_memory
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.memset.argtypes, library.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
library.memset.restype = ctypes.c_void_p
kept = keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    place = library.malloc(48 * 2**20)
    library.memset(place, 1, 48 * 2**20)
    library.free(place)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_buffers_are_used_again() -> None:
    """Unless the environment says what the C library is to do."""

    def faults(**environment: str) -> tuple[str, int]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain | environment)
        kept, count = done.stdout.split()
        return kept, int(count)

    pages = 48 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    kept, count = faults()
    assert kept == "True" and count < 2 * pages
    kept, count = faults(MALLOC_MMAP_THRESHOLD_="131072")
    assert kept == "False" and count > 5 * pages


TRIMMED = """
import ctypes
from pathlib import Path
from tmjax.allocator import give_back_freed_memory, keep_freed_memory
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.memset.argtypes, library.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
library.memset.restype = ctypes.c_void_p
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1])
keep_freed_memory()
places = [library.malloc(48 * 2**20) for _ in range(4)]
for place in places:
    library.memset(place, 1, 48 * 2**20)
end = library.malloc(64)  # what is behind the buffers keeps the heap from shrinking by itself
for place in places:
    library.free(place)
held = resident()
give_back_freed_memory()
print(held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_given_back_between_stages() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", TRIMMED], capture_output=True, text=True, check=True, env=plain)
    assert int(done.stdout) * os.sysconf("SC_PAGE_SIZE") > 150 * 2**20
