"""Work on the rows of a large matrix, some at a time, so that the matrix itself is never in memory."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from tmjax.typing import Array

#: Entries of a block: 8 MiB of float32, which the last cache of a processor holds.
BLOCK_ENTRIES = 2**21

Carry = TypeVar("Carry")


def block_size(n: int, k: int) -> int:
    """Rows of a block of an [n, k] matrix; all n if they fit into one."""
    return n if n * k <= BLOCK_ENTRIES else min(n, max(8, BLOCK_ENTRIES // k))


def scan_rows(n: int, size: int, step: Callable[[Carry, Array | int, Array], Carry], carry: Carry) -> Carry:
    """Calls `step(carry, start, fresh)` for blocks of `size` rows from `start` on that together cover n rows.

    Where size does not divide n the last block begins earlier and overlaps the one before: `fresh` [size] (bool) says
    which of its rows are new, for whoever adds them up.
    """
    if size >= n:
        return step(carry, 0, jnp.ones((n,), bool))

    def body(number: Array, carry: Carry) -> Carry:
        start = jnp.minimum(number * size, n - size)
        return step(carry, start, start + jnp.arange(size) >= number * size)

    return jax.lax.fori_loop(0, -(-n // size), body, carry)


def rows_product(n: int, k: int, rows: Callable[[Array | int, int], Array], x: Array) -> Array:
    """A x [n, d] for x [k, d] and a matrix A [n, k] of which `rows(start, size)` gives some rows."""
    size = block_size(n, k)

    def step(out: Array, start: Array | int, _fresh: Array) -> Array:
        block = jnp.matmul(rows(start, size), x, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.dynamic_update_slice_in_dim(out, block, start, axis=0)

    return scan_rows(n, size, step, jnp.zeros((n, x.shape[-1]), jnp.float32))


def columns_product(n: int, k: int, rows: Callable[[Array | int, int], Array], x: Array) -> Array:
    """A^T x [k, d] for x [n, d] and a matrix A [n, k] of which `rows(start, size)` gives some rows."""
    size = block_size(n, k)

    def step(total: Array, start: Array | int, fresh: Array) -> Array:
        some = jax.lax.dynamic_slice_in_dim(x, start, size, axis=0) * fresh[:, None]
        return total + jnp.matmul(rows(start, size).T, some, precision=jax.lax.Precision.HIGHEST)

    return scan_rows(n, size, step, jnp.zeros((k, x.shape[-1]), jnp.float32))
