"""Plans with few entries: the largest of another plan (paper, appendix A.1), or a list of matches."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.ot.plan import EntropicPlan, Plan
from tmjax.ot.row_blocks import block_size, scan_rows
from tmjax.typing import Array, ArrayLike, pytree_dataclass


@pytree_dataclass
@dataclass(frozen=True)
class SparsePlan(Plan):
    """The entries of a plan that are among the t largest (by size) of their row, or the s largest of their column.

    `columns` [..., n, t] (int32) and `values` [..., n, t] are the former; `rows` [..., k, s] and `column_values`
    [..., k, s] the latter, with value 0 for entries that are among the former already.
    """

    columns: ArrayLike
    values: ArrayLike
    rows: ArrayLike
    column_values: ArrayLike

    @staticmethod
    def bytes(n: int, k: int, top_k: int) -> int:
        """Bytes of the plan of n x k units."""
        return 8 * (n * min(top_k, k) + k * min(top_k, n))

    @classmethod
    def of(cls, plan: Plan, top_k: int) -> "SparsePlan":
        """The `top_k` largest entries of every row and column of one plan, potentials read in blocks of rows."""
        if not isinstance(plan, EntropicPlan):
            matrix = plan.matrix()
            n, k = matrix.shape
            size, some = n, lambda _start, _size: matrix
        else:
            n, k = plan.cost.shape
            size, some = block_size(n, k), plan.rows
        t, s = min(top_k, k), min(top_k, n)

        def step(carry: tuple[Array, ...], start: Array | int, fresh: Array) -> tuple[Array, ...]:
            columns, values, smallest, rows, column_values = carry
            q = some(start, fresh.shape[0])
            sizes, chosen = jax.lax.top_k(jnp.abs(q), t)
            entries = jnp.take_along_axis(q, chosen, axis=1)
            # The best so far of every column against those of this block; rows that came before count once.
            old = jnp.concatenate([column_values, jnp.where(fresh[:, None], q, 0.0).T], axis=1)
            numbers = jnp.broadcast_to(start + jnp.arange(fresh.shape[0], dtype=jnp.int32), (k, fresh.shape[0]))
            _, best = jax.lax.top_k(jnp.abs(old), s)
            return (
                jax.lax.dynamic_update_slice_in_dim(columns, chosen.astype(jnp.int32), start, axis=0),
                jax.lax.dynamic_update_slice_in_dim(values, entries, start, axis=0),
                jax.lax.dynamic_update_slice_in_dim(smallest, sizes[:, -1], start, axis=0),
                jnp.take_along_axis(jnp.concatenate([rows, numbers], axis=1), best, axis=1),
                jnp.take_along_axis(old, best, axis=1),
            )

        empty = (
            jnp.zeros((n, t), jnp.int32),
            jnp.zeros((n, t)),
            jnp.zeros((n,)),
            jnp.zeros((k, s), jnp.int32),
            jnp.zeros((k, s)),
        )
        columns, values, smallest, rows, column_values = scan_rows(n, size, step, empty)
        both = jnp.abs(column_values) >= smallest[rows]
        return cls(columns, values, rows, jnp.where(both, 0.0, column_values))

    def matrix(self) -> Array:
        """Q [..., n, k]."""
        batch = jnp.shape(self.columns)[:-2]
        flat = [jnp.asarray(x).reshape(-1, *jnp.shape(x)[-2:]) for x in jax.tree.leaves(self)]
        dense = jax.vmap(_scatter)(*flat)
        return dense.reshape(*batch, *dense.shape[1:])

    def apply(self, x: Array) -> Array:
        """Q x for x [k, d]: t + s rows of x are gathered or added per unit."""
        columns, values, rows, column_values = (jnp.asarray(y) for y in jax.tree.leaves(self))
        if columns.ndim > 2:
            return super().apply(x)
        start = jnp.zeros((columns.shape[0], x.shape[-1]), jnp.float32)

        def gather(total: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
            return total + entry[1][:, None] * x[entry[0]], None

        def scatter(total: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
            return total.at[entry[0]].add(entry[1][:, None] * x), None

        total, _ = jax.lax.scan(gather, start, (columns.T, values.T))
        return jax.lax.scan(scatter, total, (rows.T, column_values.T))[0]


def _scatter(columns: Array, values: Array, rows: Array, column_values: Array) -> Array:
    n, k = columns.shape[0], rows.shape[0]
    dense = jnp.zeros((n, k), jnp.float32).at[jnp.arange(n)[:, None], columns].add(values)
    return dense.at[rows, jnp.arange(k)[:, None]].add(column_values)


@pytree_dataclass
@dataclass(frozen=True)
class EdgePlan(Plan):
    """A list of matches: `mass` [..., E] between unit `rows` [..., E] and unit `columns` [..., E] (int32), each once.

    `given` [..., n] and `received` [..., k] are the marginals.
    """

    rows: ArrayLike
    columns: ArrayLike
    mass: ArrayLike
    given: ArrayLike
    received: ArrayLike

    @classmethod
    def of(cls, rows: np.ndarray, columns: np.ndarray, mass: np.ndarray, shape: tuple[int, int]) -> "EdgePlan":
        """The plan [n, k] of these matches (one problem)."""
        given, received = (np.bincount(x, mass, size) for x, size in zip((rows, columns), shape, strict=True))
        indices = (jnp.asarray(x, jnp.int32) for x in (rows, columns))
        return cls(*indices, *(jnp.asarray(x, jnp.float32) for x in (mass, given, received)))

    def matrix(self) -> Array:
        """Q [..., n, k]."""
        rows = jax.nn.one_hot(self.rows, jnp.shape(self.given)[-1]) * jnp.asarray(self.mass)[..., None]
        columns = jax.nn.one_hot(self.columns, jnp.shape(self.received)[-1])
        return jnp.einsum("...en,...ek->...nk", rows, columns, precision=jax.lax.Precision.HIGHEST)

    def apply(self, x: Array) -> Array:
        """Q x by indexing, of one problem."""
        if jnp.ndim(self.rows) > 1:
            return super().apply(x)
        moved = jnp.asarray(self.mass)[:, None] * x[jnp.asarray(self.columns)]
        return jnp.zeros((jnp.shape(self.given)[0], x.shape[1]), moved.dtype).at[jnp.asarray(self.rows)].add(moved)
