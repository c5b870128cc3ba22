"""Memory of the device that work runs on, of which parts are set aside for one purpose or another."""

from tmjax import backend

#: Default memory of the solver: a quarter of an accelerator's, this many MiB of a CPU's.
SOLVER_SHARE, SOLVER_CPU_MIB = 4, 512


def share_mib(share: int, cpu: int) -> int:
    """MiB of a `share`-th of the device's memory, at least `cpu`; `cpu` on a CPU or where it is not known.

    A power of two: processes whose devices differ a little must come to the same.
    """
    limit = backend.device_memory()
    return cpu if limit is None else max(cpu, 2 ** ((limit // share // 2**20).bit_length() - 1))


def solver_mib(given: int | None) -> int:
    """`alignment.memory_mib`, or its default."""
    return given or share_mib(SOLVER_SHARE, SOLVER_CPU_MIB)
