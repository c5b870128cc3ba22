"""Solutions of solvers, each in its own form: potentials, a dense coupling, low-rank factors, matches or maps.

All axes before the last two (of matrices) or the last (of vectors) are independent problems. Methods that work in
blocks of rows are for one problem (no such axes); they never hold more of a plan kept as potentials than a block.
"""

import abc
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp

from tmjax.ot.cost import Cost, cost_matrix, cost_rows
from tmjax.ot.problem import Problem
from tmjax.ot.row_blocks import block_size, columns_product, rows_product
from tmjax.typing import Array, ArrayLike, pytree_dataclass


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _slice(x: Array, start: Array | int, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, size)


def coupling(f: Array, g: Array, cost: Array, epsilon: Array | float) -> Array:
    """Q = exp((f + g - cost) / epsilon) [..., n, k], the entropic coupling of potentials f [..., n] and g [..., k]."""
    return jnp.exp((f[..., :, None] + g[..., None, :] - cost) / epsilon)


def unsigned(cost: ArrayLike) -> Array:
    """1 - |rho| [..., n, k] from a cost 1 - rho."""
    return 1.0 - jnp.abs(1.0 - jnp.asarray(cost))


class Plan(abc.ABC):
    """A coupling Q [..., n, k], applied from either side."""

    @abc.abstractmethod
    def matrix(self) -> Array:
        """Q [..., n, k]."""

    def apply(self, x: Array) -> Array:
        """Q x for x [..., k, d]: moves values on the second side to the first."""
        return _matmul(self.matrix(), x)

    def apply_transpose(self, x: Array) -> Array:
        """Q^T x for x [..., n, d]: moves values on the first side to the second."""
        return _matmul(jnp.swapaxes(self.matrix(), -1, -2), x)

    def reversed(self) -> "Plan":
        """The plan whose `apply` is the transpose of this one's `apply_transpose`: itself, unless a pair of maps."""
        return self

    def magnitude(self) -> Array:
        """|Q| [..., n, k], the coupling whose marginals are certified: Q itself unless entries are signed."""
        return self.matrix()

    def price(self, problem: Problem) -> Array:
        """Returns the cost of |Q| per unit of mass [..., n, k]: the problem's, unless the solver has another."""
        return cost_matrix(problem.cost)

    def measure(self, problem: Problem, _start: Array | int, _size: int) -> tuple[Array, Array, Array]:
        """|Q|, ln |Q| (anything where Q is 0) and the price, rows [start, start + size) of one problem."""
        q = self.attach(problem).magnitude()
        return q, jnp.log(jnp.where(q > 0, q, 1.0)), self.price(problem)

    def measured_rows(self, shape: tuple[int, int]) -> int:
        """Number of rows that `measure` gives at a time: all, unless the plan can make parts of them."""
        return shape[0]

    def attach(self, _problem: Problem) -> "Plan":
        """The plan with what it needs of its problem; solvers leave it out so that batches do not copy costs."""
        return self


@pytree_dataclass
@dataclass(frozen=True)
class EntropicPlan(Plan):
    """Potentials f [..., n], g [..., k] of the entropic problem with regularisation epsilon [...] and its cost."""

    f: ArrayLike
    g: ArrayLike
    epsilon: ArrayLike
    cost: Cost | ArrayLike | None = None

    @staticmethod
    def own_price(cost: Array) -> Array:
        """Computes the cost of the plan from the problem's cost."""
        return cost

    @staticmethod
    def sign(_cost: Array) -> Array | float:
        """The sign of the plan's entries."""
        return 1.0

    def _exponent(self, price: Array) -> Array:
        f, g, epsilon = (jnp.asarray(x) for x in (self.f, self.g, self.epsilon))
        return (f[..., :, None] + g[..., None, :] - price) / epsilon[..., None, None]

    def matrix(self) -> Array:
        """Q [..., n, k]."""
        return self.sign(cost_matrix(self.cost)) * self.magnitude()

    def magnitude(self) -> Array:
        """|Q| [..., n, k]."""
        return jnp.exp(self._exponent(self.own_price(cost_matrix(self.cost))))

    def price(self, problem: Problem) -> Array:
        """Returns the cost of |Q| per unit of mass."""
        return self.own_price(cost_matrix(problem.cost))

    def measure(self, problem: Problem, start: Array | int, size: int) -> tuple[Array, Array, Array]:
        """|Q|, ln |Q| and the price of some rows of one problem, from its cost."""
        price = self.own_price(cost_rows(problem.cost, start, size))
        exponent = replace(self, f=_slice(self.f, start, size))._exponent(price)
        return jnp.exp(exponent), exponent, price

    def measured_rows(self, shape: tuple[int, int]) -> int:
        """Rows of a block."""
        return block_size(*shape)

    def rows(self, start: Array | int, size: int) -> Array:
        """Rows [start, start + size) of Q, of one problem."""
        cost = cost_rows(self.cost, start, size)
        return self.sign(cost) * replace(self, f=_slice(self.f, start, size), cost=cost).magnitude()

    @property
    def _blocked(self) -> bool:
        n, k = self.cost.shape[-2:]
        return len(self.cost.shape) == 2 and block_size(n, k) < n

    def apply(self, x: Array) -> Array:
        """Q x; of one problem in blocks of rows."""
        return rows_product(*self.cost.shape, self.rows, x) if self._blocked else super().apply(x)

    def apply_transpose(self, x: Array) -> Array:
        """Q^T x; of one problem in blocks of rows."""
        return columns_product(*self.cost.shape, self.rows, x) if self._blocked else super().apply_transpose(x)

    def attach(self, problem: Problem) -> "EntropicPlan":
        """The plan with its cost."""
        return replace(self, cost=problem.cost)


@pytree_dataclass
@dataclass(frozen=True)
class SignedPlan(EntropicPlan):
    """sign(rho) times the entropic coupling at cost 1 - |rho|; `cost` is 1 - rho, as in the problem.

    Units without correlation (rho = 0) are coupled in `magnitude` but not in `matrix`: they have no sign.
    """

    @staticmethod
    def own_price(cost: Array) -> Array:
        """1 - |rho|."""
        return unsigned(cost)

    @staticmethod
    def sign(cost: Array) -> Array:
        """sign(rho)."""
        return jnp.sign(1.0 - jnp.asarray(cost))


@pytree_dataclass
@dataclass(frozen=True)
class DensePlan(Plan):
    """The coupling itself, q [..., n, k]."""

    q: ArrayLike

    def matrix(self) -> Array:
        """Q [..., n, k]."""
        return jnp.asarray(self.q)


@pytree_dataclass
@dataclass(frozen=True)
class LowRankPlan(Plan):
    """Q = q diag(1 / g) r^T with q [..., n, rank], r [..., k, rank], g [..., rank] (Scetbon et al. 2021)."""

    q: ArrayLike
    r: ArrayLike
    g: ArrayLike

    def _left(self) -> Array:
        return jnp.asarray(self.q) / jnp.asarray(self.g)[..., None, :]

    def matrix(self) -> Array:
        """Q [..., n, k]."""
        return _matmul(self._left(), jnp.swapaxes(jnp.asarray(self.r), -1, -2))

    def apply(self, x: Array) -> Array:
        """Q x through the factors."""
        return _matmul(self._left(), _matmul(jnp.swapaxes(jnp.asarray(self.r), -1, -2), x))

    def apply_transpose(self, x: Array) -> Array:
        """Q^T x through the factors."""
        return _matmul(jnp.asarray(self.r), _matmul(jnp.swapaxes(self._left(), -1, -2), x))


@pytree_dataclass
@dataclass(frozen=True)
class MatchPlan(Plan):
    """Every unit of the first side sends all of its mass to one unit of the second.

    `columns` [..., n] (int32) says to which, `mass` [..., n] how much; `received` [..., k] is what arrives there.
    """

    columns: ArrayLike
    mass: ArrayLike
    received: ArrayLike

    @classmethod
    def of(cls, columns: Array, problem: Problem) -> Self:
        """The matches of one problem (no leading axes), each with its unit's mass."""
        a = jnp.asarray(problem.a)
        return cls(jnp.asarray(columns, jnp.int32), a, jnp.zeros_like(jnp.asarray(problem.b)).at[columns].add(a))

    def matrix(self) -> Array:
        """Q [..., n, k]."""
        k = jnp.shape(self.received)[-1]
        return jax.nn.one_hot(self.columns, k, dtype=jnp.float32) * jnp.asarray(self.mass)[..., None]

    def apply(self, x: Array) -> Array:
        """Q x by indexing."""
        moved = jnp.take_along_axis(x, jnp.asarray(self.columns)[..., None], axis=-2)
        return jnp.asarray(self.mass)[..., None] * moved


@pytree_dataclass
@dataclass(frozen=True)
class LinearMap(Plan):
    """Maps between standardised units, not a coupling: x ~ to_target y and y ~ to_source x.

    `to_target` [..., n, k], `to_source` [..., k, n]. `apply` and `apply_transpose` are the two maps; `matrix` is the
    first one. There are no marginals.
    """

    to_target: ArrayLike
    to_source: ArrayLike

    def matrix(self) -> Array:
        """The map [..., n, k] to the first side."""
        return jnp.asarray(self.to_target)

    def apply_transpose(self, x: Array) -> Array:
        """to_source x for x [..., n, d]."""
        return _matmul(jnp.asarray(self.to_source), x)

    def reversed(self) -> "LinearMap":
        """The maps exchanged and transposed: its `apply` is to_source^T x."""
        return LinearMap(jnp.swapaxes(self.to_source, -1, -2), jnp.swapaxes(self.to_target, -1, -2))
