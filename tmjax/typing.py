"""Array aliases and the axis letters used in names and docstrings.

Axis letters: B batch of token sequences, T tokens, R pooled rows of a batch, N rows of a whole text set, L target
layers, M source layers, S stacked layers of either model, n target units, k source units, V vocabulary, D documents.
A trailing `_bt` on a name says that its axes are [B, T].
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias, TypeVar

import jax
import numpy as np

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.Array | np.ndarray
#: Parameters of one model: flat, keyed by dotted Flax path, block parameters stacked on a leading layer axis.
Params: TypeAlias = Mapping[str, ArrayLike]

_Class = TypeVar("_Class", bound=type)


def pytree_dataclass(cls: _Class) -> _Class:
    """Registers a dataclass as a pytree whose leaves are its fields.

    Not `jax.tree_util.register_dataclass`: in jaxlib 0.10.2 the structures of two such classes with as many fields are
    equal, so a cache keyed by structure now and then gives one plan's result the class of another.
    """
    names = tuple(field.name for field in dataclasses.fields(cls))
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)

    def flatten(value: object) -> tuple[tuple[object, ...], None]:
        return tuple(getattr(value, name) for name in names), None

    def flatten_with_keys(value: object) -> tuple[tuple[tuple[object, object], ...], None]:
        return tuple((key, getattr(value, name)) for key, name in zip(keys, names, strict=True)), None

    def unflatten(_: None, children: tuple[object, ...]) -> object:
        value = object.__new__(cls)  # children may be anything, so no checks of __post_init__
        for name, child in zip(names, children, strict=True):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
