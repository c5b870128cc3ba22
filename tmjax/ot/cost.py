"""Costs between units: 1 - Pearson correlation (or cosine) of their activations over the same rows of text."""

import functools

import jax
import jax.numpy as jnp

from tmjax.typing import Array

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
    """Correlations [..., n, k] of standardised activations [..., N, n] and [..., N, k]; one float32 matrix product."""
    product = jnp.einsum("...rn,...rk->...nk", zx_nt, zy_nk, precision=jax.lax.Precision.HIGHEST)
    return jnp.clip(product, -1.0, 1.0)
