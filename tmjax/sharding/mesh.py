"""A mesh of devices with the axes data, fsdp and tensor; where parameters, batches and activations lie on it.

Parameters are split over `fsdp` along their embedding axis and over `tensor` along heads, MLP units, experts or
vocabulary; batches over `data` and `fsdp`, activations also over `tensor` along heads and MLP units. XLA inserts the
communication. The devices may be those of several processes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tmjax.errors import InputError
from tmjax.typing import Array

AXES = ("data", "fsdp", "tensor")
#: Logical axis of a parameter -> mesh axis.
RULES: Mapping[str, str] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "tensor",
    "shared_mlp": "tensor",
    "kv_up": "tensor",
    "values": "tensor",
}
#: Logical axis of an activation -> mesh axes. Its embedding axis is whole: fsdp already splits the batch.
ACTIVATION_RULES: Mapping[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


class Parameter(Protocol):
    """What a layout reads of a row of a family's table."""

    path: str
    axes: tuple[str, ...]


#: Chosen by `automatic`.
AUTO = "auto"


def parse_mesh(text: str | None) -> dict[str, int]:
    """Sizes of the three axes from `data=2,fsdp=4`; None is one device. Raises InputError."""
    sizes = dict.fromkeys(AXES, 1)
    given: set[str] = set()
    for part in text.split(",") if text else ():
        axis, _, number = (piece.strip() for piece in part.partition("="))
        if axis not in AXES or not number.isdecimal() or int(number) < 1 or axis in given:
            raise InputError(
                f"mesh {text!r}: write for example data=2,fsdp=2,tensor=2 (axes {', '.join(AXES)}, each once), or auto"
            )
        given.add(axis)
        sizes[axis] = int(number)
    return sizes


def automatic(devices: int, widths: Iterable[int]) -> dict[str, int]:
    """A mesh of all devices: parameters over as many as divide all of the models' `widths`, the rest data."""
    common = math.gcd(devices, *widths)
    return {"data": devices // common, "fsdp": common, "tensor": 1}


class Layout:
    """Where parameters and batches go; a layout of one device leaves everything to JAX's default.

    `widths` are the embedding sizes of the models, which `auto` divides. Raises InputError for a mesh that the devices
    of the job do not make up. `devices` are the ones to use, such as those of a topology that programs are compiled
    for; all of the job unless given.
    """

    def __init__(
        self, mesh: str | None = None, widths: Iterable[int] = (), devices: Sequence[jax.Device] | None = None
    ) -> None:
        available = jax.devices() if devices is None else list(devices)
        self.sizes = automatic(len(available), widths) if mesh == AUTO else parse_mesh(mesh)
        self.devices = math.prod(self.sizes.values())
        self.mesh = None
        if self.devices > len(available):
            raise InputError(f"mesh {mesh!r} needs {self.devices} devices, {len(available)} are here")
        if devices is None and jax.process_count() > 1 and self.devices != len(available):
            raise InputError(
                f"mesh {mesh!r} has {self.devices} devices, the job's {jax.process_count()} processes have"
                f" {len(available)}; a mesh over processes takes all"
            )
        if self.devices > 1:
            self.mesh = _mesh(tuple(self.sizes[axis] for axis in AXES), available[: self.devices])

    @property
    def batch_multiple(self) -> int:
        """The number that the leading axis of a batch must be a multiple of."""
        return self.sizes["data"] * self.sizes["fsdp"]

    def place_batch(self, array: np.ndarray, axis: int = 0) -> Array:
        """Puts a batch on the devices, `axis` split over data and fsdp; a process gives all that its devices get."""
        if self.mesh is None:
            return jax.numpy.asarray(array)
        spec = PartitionSpec(*[None] * axis, ACTIVATION_RULES["batch"])
        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, spec), lambda index: array[index])

    def own_rows(self, rows: int) -> np.ndarray:
        """Whether each of the rows of a batch is on a device of this process, bool [rows]."""
        own = np.full(rows, self.mesh is None)
        if self.mesh is not None:
            sharding = NamedSharding(self.mesh, PartitionSpec(ACTIVATION_RULES["batch"]))
            for (part,) in sharding.addressable_devices_indices_map((rows,)).values():
                own[part] = True
        return own

    def place(self, row: Parameter, shape: tuple[int, ...]) -> NamedSharding | None:
        """`param_sharding` of a row of a family's table."""
        return self.param_sharding(row.path, row.axes, shape)

    def param_sharding(self, name: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding | None:
        """Sharding of a parameter whose trailing axes are the logical `axes`; a leading layer axis is never split.

        Raises InputError if an axis does not divide evenly.
        """
        if self.mesh is None:
            return None
        chosen: list[str | None] = [None] * (len(shape) - len(axes))
        for axis, size in zip(axes, shape[len(chosen) :], strict=True):
            where = RULES.get(axis)
            if where is not None and where in chosen:
                raise InputError(f"parameter {name}: two of its axes {axes} ask for the mesh axis {where}")
            if where is not None and size % self.sizes[where]:
                raise InputError(
                    f"mesh axis {where}={self.sizes[where]} does not divide {axis}={size} of parameter {name};"
                    " choose another --mesh"
                )
            chosen.append(where)
        return NamedSharding(self.mesh, PartitionSpec(*chosen))


def _mesh(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> Mesh:
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except (NotImplementedError, ValueError, AssertionError):
        # The shape does not fit the wiring (part of a slice, several slices): any order of the devices is right.
        return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=types)


def constrain(mesh: Mesh | None, x: Array, axes: tuple[str | None, ...]) -> Array:
    """`x` inside a jitted function, laid out as its logical axes say (ACTIVATION_RULES); None is not split."""
    if mesh is None:
        return x
    spec = PartitionSpec(*(ACTIVATION_RULES.get(axis) for axis in axes))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
