"""Peak memory of this process."""

import contextlib
import resource
import sys
from pathlib import Path


def peak_rss_mib() -> float:
    """Returns the largest resident memory of this process so far, in MiB."""
    with contextlib.suppress(OSError, StopIteration):  # getrusage begins at the memory of the parent process
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
