"""Costs between units: 1 - Pearson correlation (or cosine) of their activations over the same rows of text."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tmjax import backend
from tmjax.typing import Array, ArrayLike, pytree_dataclass

#: A unit whose standard deviation is below this fraction of its root mean square is constant: float32 noise, no signal.
CONSTANT = 1e-6


@functools.partial(jax.jit, static_argnames="centre")
def standardise(x_nu: Array, *, centre: bool = True) -> Array:
    """Columns of `x` [..., N, unit] with mean 0 (unless not `centre`) and Euclidean norm 1, float32.

    The product of two such matrices is the matrix of correlations (cosines). Constant columns become 0: they correlate
    with nothing.
    """
    x = x_nu.astype(jnp.float32)
    rms = jnp.sqrt(jnp.mean(x * x, axis=-2, keepdims=True))
    if centre:
        x = x - jnp.mean(x, axis=-2, keepdims=True)
    norm = jnp.sqrt(jnp.sum(x * x, axis=-2, keepdims=True))
    alive = norm > CONSTANT * rms * x.shape[-2] ** 0.5
    return jnp.where(alive, x / jnp.where(alive, norm, 1.0), 0.0)


def correlation(zx_nt: Array, zy_nk: Array) -> Array:
    """Correlations [..., n, k] float32 of standardised activations [..., N, n] and [..., N, k], by one matrix product.

    Of float16 activations the products are exact in float32, so that accelerators may take their fast units for them;
    the CPU has none and widens them first.
    """
    if zx_nt.dtype != jnp.float16 or backend.platform() == "cpu":
        zx_nt, zy_nk = zx_nt.astype(jnp.float32), zy_nk.astype(jnp.float32)
    product = jnp.einsum(
        "...rn,...rk->...nk", zx_nt, zy_nk, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return jnp.clip(product, -1.0, 1.0)


@pytree_dataclass
@dataclass(frozen=True)
class FeatureCost:
    """The cost 1 - correlation [..., n, k] as the standardised activations zx [..., N, n] and zy [..., N, k].

    For costs that are too large to keep: whoever needs some rows of it makes them.
    """

    zx: ArrayLike
    zy: ArrayLike

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the cost."""
        return (*jnp.shape(self.zx)[:-2], jnp.shape(self.zx)[-1], jnp.shape(self.zy)[-1])

    def rows(self, start: Array | int, size: int) -> Array:
        """Rows [start, start + size) of the cost."""
        return 1.0 - correlation(jax.lax.dynamic_slice_in_dim(self.zx, start, size, axis=-1), jnp.asarray(self.zy))


#: A cost [..., n, k], written out or rebuilt when needed.
Cost = Array | FeatureCost


def cost_matrix(cost: Cost) -> Array:
    """The cost written out, [..., n, k]."""
    if not isinstance(cost, FeatureCost):
        return cost
    # A batched product that a branch of `lax.cond` captures ends the TPU compiler (libtpu 0.0.42 and 0.0.52, SIGILL in
    # its BFloat16 propagation); nothing propagates through the barrier.
    return jax.lax.optimization_barrier(1.0 - correlation(jnp.asarray(cost.zx), jnp.asarray(cost.zy)))


def cost_rows(cost: Cost, start: Array | int, size: int) -> Array:
    """Rows [start, start + size) of a cost, [..., size, k]."""
    if isinstance(cost, FeatureCost):
        return cost.rows(start, size)
    return jax.lax.dynamic_slice_in_dim(cost, start, size, axis=-2)


def cost_bounds(cost: Cost) -> tuple[Array, Array]:
    """A lower and an upper bound [...] of a cost [..., n, k]: its extremes if it is written out, else 0 and 2."""
    if isinstance(cost, FeatureCost):
        return jnp.zeros(cost.shape[:-2]), jnp.full(cost.shape[:-2], 2.0)
    return jnp.min(cost, axis=(-2, -1)), jnp.max(cost, axis=(-2, -1))
