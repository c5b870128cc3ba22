"""Attention with linear biases (ALiBi, Press et al. 2022): scores fall with the distance of query and key."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.models.spec import Alibi
from tmjax.typing import Array


def slopes(heads: int) -> np.ndarray:
    """Slopes [heads] of a model's heads, float32, before `Alibi.scale`."""
    whole = 2 ** int(math.log2(heads))
    first = 2.0 ** (-8 * np.arange(1, whole + 1) / whole)
    further = 2.0 ** (-8 * np.arange(1, 2 * (heads - whole), 2) / (2 * whole))
    return np.concatenate([first, further]).astype(np.float32)


def alibi_bias(alibi: Alibi, heads: tuple[int, ...], distance: Array, position: Array) -> Array:
    """Biases of scores.

    Args:
        alibi: The kind of biases.
        heads: Axes of the heads.
        distance: Positions of queries less those of keys, [Q, T] or [B, 1, ..., Q, T], int32.
        position: Positions of the queries, of that shape without its last axis.

    Returns:
        The biases [(B,) *heads, Q, T], float32.
    """
    slope = slopes(math.prod(heads)).reshape(*heads, 1, 1)
    if not alibi.rounded:
        return -(slope * np.float32(alibi.scale)) * distance.astype(jnp.float32)

    def rounded(x: Array) -> Array:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # a cast to and fro may be left out

    slope, query = rounded(jnp.asarray(slope)), position[..., None]
    key, query = (rounded(slope * rounded(x.astype(jnp.float32))) for x in (query - distance, query))
    return (key - query) * np.float32(alibi.scale)
