"""The machine that programs are made for: the one at hand, unless a process says that it compiles for another."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Machine:
    """A kind of device that programs are compiled for without being there.

    Attributes:
        platform: Its backend: `tpu` or `gpu`.
        memory: Bytes of a device.
    """

    platform: str
    memory: int


_compiled_for: Machine | None = None


def compile_for(machine: Machine | None) -> None:
    """Makes `platform` and `device_memory` those of `machine`, for the rest of this process; None: the one at hand.

    Choices that code makes by the kind of device are then those of that machine, as the shapes of its programs are.
    """
    global _compiled_for
    _compiled_for = machine


def platform() -> str:
    """Backend that programs run on: `cpu`, `gpu` or `tpu`."""
    return jax.default_backend() if _compiled_for is None else _compiled_for.platform


def device_memory() -> int | None:
    """Bytes of a device's own memory; None on a CPU, or where it is not known."""
    if _compiled_for is not None:
        return _compiled_for.memory
    device = jax.local_devices()[0]
    return (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
