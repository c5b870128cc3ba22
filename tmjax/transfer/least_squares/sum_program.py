"""Arrays of the sums of the operator `predictions`, and where they lie on a mesh."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tmjax.models.spec import DecoderSpec
from tmjax.transfer.least_squares.ridge_systems import DEVICES
from tmjax.typing import Array


class Sums(NamedTuple):
    """Sums or means over positions: target changes times inputs, of true tokens and of the teacher; Grams of inputs.

    `cross` [2, V, embed] and `gram` [embed, embed] belong to the read-out, `curvature` [V] is its mean of p (1 - p);
    on a mesh V is padded to a multiple of the devices. `inner` [2, L, out, in] by path and `grams` [L, in, in] by input
    site belong to the projections. `count` [3]: positions of the true tokens, of the teacher (by its probability), of
    all texts.
    """

    cross: Any
    gram: Any
    curvature: Any
    inner: dict[str, Any]
    grams: dict[str, Any]
    count: Any


@dataclass(frozen=True)
class SumProgram:
    """Everything static about the sums: what is solved, and where it lies.

    Attributes:
        spec: Architecture of the target.
        readout: Path of the read-out.
        writers: (path, input site) of the projections that change.
        shapes: Shapes [L, out, in] of their weights.
        dtype: Dtype of the forward pass.
        mesh: Devices; None is one.
        placements: Layouts of the solved tensors on the mesh, the read-out's first; empty without one.
    """

    spec: DecoderSpec
    readout: str
    writers: tuple[tuple[str, str], ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: jnp.dtype
    mesh: Mesh | None = None
    placements: tuple[NamedSharding, ...] = ()

    @property
    def devices(self) -> int:
        """The number of devices."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def vocab(self) -> int:
        """Rows of the sums of the read-out."""
        return -(-self.spec.vocab // self.devices) * self.devices

    @property
    def inputs(self) -> dict[str, int]:
        """Units of every input site."""
        return {site: shape[-1] for (_, site), shape in zip(self.writers, self.shapes, strict=True)}

    def sharding(self, *axes: Any) -> NamedSharding | None:
        """The sharding of an array whose axes are split over these mesh axes."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*axes))

    def place(self, x: Array, *axes: Any) -> Array:
        """The array, laid out so inside a jitted function."""
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    def _axes(self, size: int, *choices: Any) -> Any:
        """The first of these (tuples of) mesh axes that divide an axis of this size."""
        for axes in choices:
            count = 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in axes)
            if count > 1 and size % count == 0:
                return axes
        return None

    def gram_axes(self, size: int) -> tuple[Any, Any]:
        """The mesh axes over which the rows and columns of a Gram matrix are split."""
        return self._axes(size, ("data", "fsdp"), ("fsdp",), ("data",)), self._axes(size, ("tensor",))

    def writer_axes(self, number: int) -> tuple[Any, Any]:
        """The mesh axes over which the outputs and inputs of a projection are split."""
        axes = (*self.placements[1 + number].spec, None, None, None)[:3] if self.placements else (None,) * 3
        return axes[1], axes[2]

    def shapes_of_sums(self) -> Sums:
        """The arrays of the sums, as shapes with shardings."""

        def array(shape: tuple[int, ...], *axes: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self.sharding(*axes))

        spec, layers, embed = self.spec, self.spec.layers, self.spec.hidden
        inner = {
            path: array((2, *shape), None, None, *self.writer_axes(number))
            for number, ((path, _), shape) in enumerate(zip(self.writers, self.shapes, strict=True))
        }
        grams = {site: array((layers, n, n), None, *self.gram_axes(n)) for site, n in self.inputs.items()}
        return Sums(
            array((2, self.vocab, spec.hidden), None, DEVICES),
            array((embed, embed), *self.gram_axes(embed)),
            array((self.vocab,), DEVICES),
            inner,
            grams,
            array((3,)),
        )

    def zeros(self) -> Sums:
        """Sums of nothing."""
        shapes = self.shapes_of_sums()
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        make = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape), shapes),
            out_shardings=None if self.mesh is None else shardings,
        )
        return make()
