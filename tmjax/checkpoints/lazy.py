"""A parameter that is still on disk: read whole or in slices, and checked whenever it is read."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import jax
import numpy as np

from tmjax.checkpoints.formats.safetensors import all_finite
from tmjax.checkpoints.model import Model, Placement
from tmjax.errors import NonFiniteError
from tmjax.typing import Array

#: Reads the given slices (one for every axis, without steps); raises CheckpointError and NonFiniteError.
Reader = Callable[[tuple[slice, ...]], np.ndarray]


@dataclass(frozen=True)
class LazyArray:
    """Stands for an array in the parameters of a model until it is needed: `value[layer, rows]` reads those alone."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Reader

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, at: tuple[int | slice, ...]) -> np.ndarray:
        """Reads `array[at]`: indices and slices of the leading axes, () for everything."""
        slices = [slice(part, part + 1) if isinstance(part, int) else part for part in at]
        array = self.read((*slices, *map(slice, self.shape[len(at) :])))
        return array[tuple(0 if isinstance(part, int) else slice(None) for part in at)]

    def cast(self, dtype: np.dtype, where: object) -> "LazyArray":
        """The same in another dtype; reading then raises NonFiniteError, naming `where`, if a value is too large."""
        if dtype == self.dtype:
            return self

        def read(slices: tuple[slice, ...]) -> np.ndarray:
            return cast(self.read(slices), dtype, f"{where}: parameter {self.path}")

        return replace(self, dtype=dtype, read=read)

    def place(self, sharding: jax.sharding.Sharding | None) -> Array:
        """Reads it on to devices, every one its shard; None is the default device."""
        if sharding is None:
            return jax.device_put(self[()])
        return jax.make_array_from_callback(self.shape, sharding, self.read)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in `dtype`; raises NonFiniteError with `name` if a value is too large for it."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if not all_finite(result):
        raise NonFiniteError(f"{name} does not fit {dtype.name}")
    return result


def in_memory(model: Model, placement: Placement) -> Model:
    """The model with every parameter read and put where `placement` says."""
    shards = {row.path: placement(row, row.stacked_shape(model.spec)) for row in model.rows if row.tied_to is None}
    return replace(model, params={path: value.place(shards[path]) for path, value in model.params.items()})
