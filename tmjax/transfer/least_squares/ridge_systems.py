"""Ridge systems X (A + lambda tr(A) / n I) = Y for symmetric A, of all layers, on any device and any mesh.

A CPU takes LAPACK. Elsewhere the factor is a Cholesky factor in blocks: LU and Cholesky of XLA take the TPU compiler an
hour at n = 8192, those of one block seconds, and everything else is matrix products in a loop. On a mesh every device
factors layers of its own, and nothing is sent while it does.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tmjax.sharding.mesh import AXES
from tmjax.typing import Array

#: Order in which an axis is split over all devices: a table [vocab, embed] that is split over tensor and fsdp comes to
#: it by exchanges between devices, without a whole copy on any.
DEVICES = AXES[::-1]
#: Rows of a block of the Cholesky factor.
BLOCK = 128
#: Largest residual of a solution, relative to the right-hand side, and the corrections that may reach it.
TOLERANCE, CORRECTIONS = 1e-5, 5
_EXACT = jax.lax.Precision.HIGHEST


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_EXACT)


def _factor(a: Array, block: int) -> tuple[Array, Array]:
    """The Cholesky factor of a [n, n]: blocks below its diagonal [n, n], inverses of those on it [n / block, ...]."""
    n = a.shape[0]
    row = jnp.arange(n)[:, None]

    def step(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        a, inverses = carry
        start = number * block
        own = jax.lax.linalg.cholesky(jax.lax.dynamic_slice(a, (start, start), (block, block)))
        inverse = jax.lax.linalg.triangular_solve(own, jnp.eye(block), left_side=True, lower=True)
        panel = jax.lax.dynamic_slice(a, (0, start), (n, block))
        below = jnp.where(row >= start + block, _product(panel, inverse.T), 0.0)
        a = jax.lax.dynamic_update_slice(a - _product(below, below.T), below, (0, start))
        return a, jax.lax.dynamic_update_slice(inverses, inverse[None], (number, 0, 0))

    return jax.lax.fori_loop(0, n // block, step, (a, jnp.zeros((n // block, block, block))))


def _substituted(factor: tuple[Array, Array], y: Array) -> Array:
    """x [R, n] with x L L^T = y."""
    below, inverses = factor
    rows, (count, block, _), n = y.shape[0], inverses.shape, y.shape[1]

    def ahead(number: Array, x: Array) -> Array:
        # Blocks that are not solved yet meet zeros of the factor.
        start = number * block
        known = _product(x, jax.lax.dynamic_slice(below, (start, 0), (block, n)).T)
        own = jax.lax.dynamic_slice(x, (0, start), (rows, block)) - known
        return jax.lax.dynamic_update_slice(x, _product(own, inverses[number].T), (0, start))

    def back(turn: Array, x: Array) -> Array:
        number = count - 1 - turn
        start = number * block
        known = _product(x, jax.lax.dynamic_slice(below, (0, start), (n, block)))
        own = jax.lax.dynamic_slice(x, (0, start), (rows, block)) - known
        return jax.lax.dynamic_update_slice(x, _product(own, inverses[number]), (0, start))

    return jax.lax.fori_loop(0, count, back, jax.lax.fori_loop(0, count, ahead, y))


def _one(damped: Array, y: Array, block: int) -> tuple[Array, Array]:
    """x [R, n] with x A = y, and the norm of its residual over that of y."""
    n = damped.shape[0]
    block = min(block, n)
    more = -n % block
    # Padding is a unit matrix beside A.
    whole = jnp.pad(damped, (0, more)) + jnp.diag(jnp.pad(jnp.zeros(n), (0, more), constant_values=1.0))
    y = jnp.pad(y, ((0, 0), (0, more)))
    factor, size = _factor(whole, block), jnp.maximum(jnp.linalg.norm(y), 1e-30)

    def goes_on(carry: tuple[Array, Array, Array, Array]) -> Array:
        _, _, error, count = carry
        return (error > TOLERANCE) & (count < CORRECTIONS)

    def corrected(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        x, residual, _, count = carry
        x = x + _substituted(factor, residual)
        residual = y - _product(x, whole)
        return x, residual, jnp.linalg.norm(residual) / size, count + 1

    start = jnp.zeros_like(y), y, jnp.where(jnp.any(y), jnp.inf, 0.0), jnp.int32(0)
    x, _, error, _ = jax.lax.while_loop(goes_on, corrected, start)
    return x[:, :n], error


def _damped(gram: Array, ridge: float) -> Array:
    n = gram.shape[-1]
    mean = jnp.trace(gram, axis1=-2, axis2=-1) / n
    return gram + ridge * mean[..., None, None] * jnp.eye(n)


def blocked(gram: Array, values: Array, ridge: float, block: int = BLOCK) -> tuple[Array, Array]:
    """Solutions [2, L, out, n] for A [L, n, n] and Y [2, L, out, n] by Cholesky in blocks, and residuals [L]."""

    def layer(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        # Right-hand sides become solutions in their place: no second copy of them.
        values, errors = carry
        x, error = _one(_damped(gram[number], ridge), values[:, number].reshape(-1, values.shape[-1]), block)
        return values.at[:, number].set(x.reshape(2, *values.shape[2:])), errors.at[number].set(error)

    return jax.lax.fori_loop(0, gram.shape[0], layer, (values, jnp.zeros(gram.shape[0])))


def split(gram: Array, values: Array, ridge: float, mesh: Mesh, block: int = BLOCK) -> tuple[Array, Array]:
    """`blocked` with its layers, or where there is one its rows, split over all devices of a mesh."""
    layers, rows = gram.shape[0], values.shape[2]
    if layers == 1:
        more = 0, -rows % mesh.size
        specs = PartitionSpec(), PartitionSpec(None, None, DEVICES)
        errors = PartitionSpec(DEVICES)
    else:
        more = -layers % mesh.size, 0
        specs = PartitionSpec(DEVICES), PartitionSpec(None, DEVICES)
        errors = PartitionSpec(DEVICES)
    gram = jnp.pad(gram, ((0, more[0]), (0, 0), (0, 0)))
    values = jnp.pad(values, ((0, 0), (0, more[0]), (0, more[1]), (0, 0)))
    gram, values = (
        jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        for x, spec in zip((gram, values), specs, strict=True)
    )
    solve = functools.partial(blocked, ridge=ridge, block=block)
    x, error = jax.shard_map(solve, mesh=mesh, in_specs=specs, out_specs=(specs[1], errors), check_vma=False)(
        gram, values
    )
    return x[:, :layers, :rows], jnp.max(error)[None]


def _lapack(gram: Array, values: Array, ridge: float) -> Array:
    # Both right-hand sides as more rows of one.
    rows = jnp.moveaxis(values, 0, -3).reshape(*gram.shape[:-2], -1, gram.shape[-1])
    solved = jnp.swapaxes(jnp.linalg.solve(_damped(gram, ridge), jnp.swapaxes(rows, -1, -2)), -1, -2)
    return jnp.moveaxis(solved.reshape(*gram.shape[:-2], 2, -1, gram.shape[-1]), -3, 0)


@functools.partial(jax.jit, static_argnames=("ridge", "mesh", "cpu"), donate_argnames="values")
def right_solve(gram: Array, values: Array, ridge: float, mesh: Mesh | None, cpu: bool) -> tuple[Array, Array]:
    """Solves X (A + ridge tr(A) / n I) = Y.

    Args:
        gram: Symmetric A [L, n, n], or [n, n].
        values: Y [2, L, out, n], or [2, out, n]; donated.
        ridge: Penalty, in units of the mean of the diagonal.
        mesh: Devices; None is one.
        cpu: Whether LAPACK solves.

    Returns:
        X of the shape of `values`, and residuals [...] relative to the right-hand sides: zero of LAPACK.
    """
    if cpu:
        return _lapack(gram, values, ridge), jnp.zeros(1)
    arrays = (gram, values) if gram.ndim == 3 else (gram[None], values[:, None])
    x, error = blocked(*arrays, ridge) if mesh is None else split(*arrays, ridge, mesh)
    return x.reshape(values.shape), error
