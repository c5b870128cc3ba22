"""Sinkhorn on potentials by log-sum-exp, in blocks of rows: for every epsilon, and for costs too large to keep.

Each block of a cost is read (or made, see `FeatureCost`) once per iteration: its rows give new f, which at once go into
running log-sum-exps of the columns (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax").
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tmjax.ot.cost import cost_rows
from tmjax.ot.problem import Problem
from tmjax.ot.row_blocks import block_size, scan_rows
from tmjax.typing import Array


class Potentials(NamedTuple):
    """Potentials f [..., n], g [..., k], iterations done [...] and the L1 marginal error [...] after them."""

    f: Array
    g: Array
    iterations: Array
    error: Array


def _iteration(problem: Problem, state: Potentials, epsilon: float) -> tuple[Array, Array, Array]:
    """New potentials, and the L1 error of the rows of the old ones (whose columns are exact after an iteration)."""
    n, k = problem.cost.shape
    log_a, log_b = jnp.log(problem.a), jnp.log(problem.b)

    def step(carry: tuple[Array, ...], start: Array | int, fresh: Array) -> tuple[Array, ...]:
        f, highest, total, error = carry
        cost = cost_rows(problem.cost, start, fresh.shape[0])
        log_mass = jax.lax.dynamic_slice_in_dim(log_a, start, fresh.shape[0])
        old = jax.lax.dynamic_slice_in_dim(state.f, start, fresh.shape[0])
        new = epsilon * (log_mass - jax.nn.logsumexp((state.g - cost) / epsilon, axis=1))
        # The old rows have the sums a exp((old - new) / epsilon).
        wrong = jnp.exp(log_mass) * jnp.abs(jnp.expm1((old - new) / epsilon))
        exponent = jnp.where(fresh[:, None], (new[:, None] - cost) / epsilon, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(exponent, axis=0))
        total = total * jnp.exp(highest - higher) + jnp.sum(jnp.exp(exponent - higher), axis=0)
        f = jax.lax.dynamic_update_slice_in_dim(f, new, start, axis=0)
        return f, higher, total, error + jnp.sum(jnp.where(fresh, wrong, 0.0))

    lowest = jnp.finfo(jnp.float32).min  # not -inf, whose difference to itself is NaN
    start = (state.f, jnp.full((k,), lowest), jnp.zeros((k,)), jnp.float32(0))
    f, highest, total, error = scan_rows(n, block_size(n, k), step, start)
    return f, epsilon * (log_b - highest - jnp.log(total)), error


def iterate_potentials(
    problem: Problem, start: Potentials, *, epsilon: float, threshold: float, max_iterations: int, needed: Array
) -> Potentials:
    """Iterates on one problem [n, k] until its L1 marginal error is below the threshold; does nothing unless `needed`.

    Iterations stop at the rounding of the exponents in float32, which `certify` allows for.
    """
    rounding = jnp.finfo(jnp.float32).eps / epsilon

    def unfinished(state: Potentials) -> Array:
        # |cost| is at most |f| + |g| + epsilon |ln Q|, so the potentials tell the size of the exponents.
        floor = rounding * (jnp.max(jnp.abs(state.f)) + jnp.max(jnp.abs(state.g)))
        return needed & ~(state.error <= threshold + floor) & (state.iterations < max_iterations)

    def step(state: Potentials) -> Potentials:
        f, g, error = _iteration(problem, state, epsilon)
        # The error of the start does not belong to these iterations.
        return Potentials(f, g, state.iterations + 1, jnp.where(state.iterations == start.iterations, jnp.inf, error))

    return jax.lax.while_loop(unfinished, step, start._replace(error=jnp.full_like(start.error, jnp.inf)))
