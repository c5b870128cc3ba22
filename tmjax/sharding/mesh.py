"""A mesh of devices with the axes data, fsdp and tensor; where parameters and batches lie on it.

Parameters are split over `fsdp` along their embedding axis and over `tensor` along heads, MLP units or vocabulary;
batches over `data` and `fsdp`. XLA inserts the communication.
"""

import math
from collections.abc import Mapping

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
}


def parse_mesh(text: str | None) -> dict[str, int]:
    """Sizes of the three axes from `data=2,fsdp=4`; None is one device. Raises InputError."""
    sizes = dict.fromkeys(AXES, 1)
    given: set[str] = set()
    for part in text.split(",") if text else ():
        axis, _, number = (piece.strip() for piece in part.partition("="))
        if axis not in AXES or not number.isdecimal() or int(number) < 1 or axis in given:
            raise InputError(
                f"mesh {text!r}: write for example data=2,fsdp=2,tensor=2 (axes {', '.join(AXES)}, each once)"
            )
        given.add(axis)
        sizes[axis] = int(number)
    return sizes


class Layout:
    """Where parameters and batches go; a layout of one device leaves everything to JAX's default."""

    def __init__(self, mesh: str | None = None) -> None:
        self.sizes = parse_mesh(mesh)
        self.devices = math.prod(self.sizes.values())
        available = jax.devices()
        if self.devices > len(available):
            raise InputError(f"mesh {mesh!r} needs {self.devices} devices, {len(available)} are here")
        self.mesh = None
        if self.devices > 1:
            grid = np.asarray(available[: self.devices]).reshape([self.sizes[axis] for axis in AXES])
            self.mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))

    @property
    def batch_multiple(self) -> int:
        """The number that the leading axis of a batch must be a multiple of."""
        return self.sizes["data"] * self.sizes["fsdp"]

    def place_batch(self, array: np.ndarray) -> Array:
        """Puts a batch on the devices, its leading axis split over data and fsdp."""
        if self.mesh is None:
            return jax.numpy.asarray(array)
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(("data", "fsdp"))))

    def param_sharding(self, name: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding | None:
        """Sharding of a parameter whose trailing axes are the logical `axes`; a leading layer axis is never split.

        Raises InputError if an axis does not divide evenly.
        """
        if self.mesh is None:
            return None
        chosen: list[str | None] = [None] * (len(shape) - len(axes))
        for axis, size in zip(axes, shape[len(chosen) :], strict=True):
            where = RULES.get(axis)
            if where in chosen:
                raise InputError(f"parameter {name}: two of its axes {axes} ask for the mesh axis {where}")
            if where is not None and size % self.sizes[where]:
                raise InputError(
                    f"mesh axis {where}={self.sizes[where]} does not divide {axis}={size} of parameter {name}"
                )
            chosen.append(where)
        return NamedSharding(self.mesh, PartitionSpec(*chosen))
