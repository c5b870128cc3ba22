"""Steps of tensors in directions that were solved for."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from tmjax.typing import Array, ArrayLike


def _norm(x: Array) -> Array:
    return jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)


@functools.partial(jax.jit, static_argnames=("trust", "placements"))
def moved(
    now: dict[str, Array],
    start: dict[str, ArrayLike],
    direction: dict[str, Array],
    step: dict[str, Array],
    weight: Array,
    trust: float | None,
    placements: tuple[tuple[str, NamedSharding], ...],
) -> dict[str, Array]:
    """Moves tensors by `step` (in units of their norms) in the mixed direction, each within `trust` of its start."""
    result, places = {}, dict(placements)
    for path, value in now.items():
        change = direction[path][0] + weight * direction[path][1]
        value = value + step[path] * change * _norm(value) / jnp.maximum(_norm(change), 1e-30)
        if trust is not None:
            first = start[path].astype(jnp.float32)
            far, limit = _norm(value - first), trust * _norm(first)
            value = first + (value - first) * jnp.where(far > limit, limit / jnp.maximum(far, 1e-30), 1.0)
        result[path] = jax.lax.with_sharding_constraint(value, places[path]) if path in places else value
    return result
