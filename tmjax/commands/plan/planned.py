"""Programs that a recipe would run, with arguments that are shapes; and where such arguments lie."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from tmjax.commands.doctor.side import Side
from tmjax.sharding.mesh import ACTIVATION_RULES, Layout

#: Words per token, where rows are words and no text is read.
WORDS_PER_TOKEN = 0.75


@dataclass(frozen=True)
class Workload:
    """Amount of text that is assumed.

    Attributes:
        texts: Number of calibration or training texts.
        tokens: Tokens of a text, of either model.
        valid: Number of validation texts of as many tokens.
        assumed: Whether no texts were read.
    """

    texts: int
    tokens: int
    valid: int
    assumed: bool = True

    @property
    def words(self) -> int:
        """Words of a text."""
        return max(1, round(self.tokens * WORDS_PER_TOKEN))


@dataclass(frozen=True)
class Planned:
    """A program and how often a run calls it.

    Attributes:
        function: The jitted function that the run itself calls.
        arguments: Its arguments: shapes with shardings, and static values.
        calls: Calls in the stage.
        live: Shapes of arrays that stay on the devices while it runs and are no arguments of it.
        turns: Turns of loops whose number the data decides.
        settings: Keys of the recipe that its temporary memory grows with, and their values.
    """

    function: Any
    arguments: tuple[Any, ...]
    calls: float = 1.0
    live: Any = ()
    turns: int = 1
    settings: Mapping[str, int] = field(default_factory=dict)


#: A stage, the name of a program, and the function that makes it; a process makes only the one that it compiles.
Entry = tuple[str, str, Callable[[], Planned]]


@dataclass(frozen=True)
class Placement:
    """Shapes on the devices of a layout.

    Attributes:
        layout: The layout.
        device: The device of a layout without a mesh.
    """

    layout: Layout
    device: Any

    def array(self, shape: Sequence[int], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
        """A shape whose axes are split over these mesh axes; whole unless given."""
        mesh = self.layout.mesh
        where = SingleDeviceSharding(self.device) if mesh is None else NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=where)

    def batch(self, shape: Sequence[int], dtype: Any, axis: int = 0) -> jax.ShapeDtypeStruct:
        """A shape whose `axis` is split as batches are."""
        return self.array(shape, dtype, *[None] * axis, ACTIVATION_RULES["batch"])

    def like(self, tree: Any) -> Any:
        """Whole arrays of the shapes of a tree."""
        return jax.tree.map(lambda x: self.array(x.shape, x.dtype), tree)

    def placed(self, x: Any) -> jax.ShapeDtypeStruct:
        """A shape with its own sharding, or on the one device."""
        mesh = self.layout.mesh
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if mesh is not None else self.like(x)

    def params(self, side: Side, dtype: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Parameters of a model by path, in the dtype of its checkpoint unless given."""
        stored = jnp.dtype(dtype or side.dtype or "float32")
        result = {}
        for row in side.rows:
            if row.tied_to is None:
                shape = row.stacked_shape(side.spec)
                where = self.layout.place(row, shape)
                where = SingleDeviceSharding(self.device) if where is None else where
                result[row.path] = jax.ShapeDtypeStruct(shape, stored, sharding=where)
        return result


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        entries = 1
        for size in leaf.sharding.shard_shape(leaf.shape):
            entries *= size
        total += entries * jnp.dtype(leaf.dtype).itemsize
    return total
