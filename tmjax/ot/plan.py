"""What a solver finds, in the form it finds it: potentials, a dense coupling, low-rank factors, matches or maps.

All axes before the last two (of matrices) or the last (of vectors) are independent problems.
"""

import abc
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from tmjax.ot.problem import Problem
from tmjax.typing import Array, ArrayLike


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


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

    def magnitude(self) -> Array:
        """|Q| [..., n, k], the coupling whose marginals are certified: Q itself unless entries are signed."""
        return self.matrix()

    def price(self, problem: Problem) -> Array:
        """What |Q| pays per unit of mass [..., n, k]: the problem's cost unless the solver charges another."""
        return problem.cost

    def attach(self, _problem: Problem) -> "Plan":
        """The plan with what it needs of its problem; solvers leave it out so that batches do not copy costs."""
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EntropicPlan(Plan):
    """Potentials f [..., n], g [..., k] of the entropic problem with regularisation epsilon [...] and its cost."""

    f: ArrayLike
    g: ArrayLike
    epsilon: ArrayLike
    cost: ArrayLike | None = None

    def matrix(self) -> Array:
        """Q [..., n, k]."""
        return coupling(self.f, self.g, self.cost, jnp.asarray(self.epsilon)[..., None, None])

    def attach(self, problem: Problem) -> "EntropicPlan":
        """The plan with its cost."""
        return replace(self, cost=problem.cost)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SignedPlan(EntropicPlan):
    """sign(rho) times the entropic coupling at cost 1 - |rho|; `cost` is 1 - rho, as in the problem.

    Units without correlation (rho = 0) are coupled in `magnitude` but not in `matrix`: they have no sign.
    """

    def matrix(self) -> Array:
        """sign(rho) |Q| [..., n, k]."""
        return jnp.sign(1.0 - jnp.asarray(self.cost)) * self.magnitude()

    def magnitude(self) -> Array:
        """|Q| [..., n, k]."""
        return coupling(self.f, self.g, unsigned(self.cost), jnp.asarray(self.epsilon)[..., None, None])

    def price(self, problem: Problem) -> Array:
        """1 - |rho|."""
        return unsigned(problem.cost)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DensePlan(Plan):
    """The coupling itself, q [..., n, k]."""

    q: ArrayLike

    def matrix(self) -> Array:
        """Q [..., n, k]."""
        return jnp.asarray(self.q)


@jax.tree_util.register_dataclass
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MatchPlan(Plan):
    """Every unit of the first side sends all of its mass to one unit of the second.

    `columns` [..., n] (int32) says to which, `mass` [..., n] how much; `received` [..., k] is what arrives there.
    """

    columns: ArrayLike
    mass: ArrayLike
    received: ArrayLike

    @classmethod
    def of(cls, columns: Array, problem: Problem) -> "MatchPlan":
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearMap(Plan):
    """Maps between standardised units, not a coupling: x ~ to_target y and y ~ to_source x.

    `to_target` [..., n, k], `to_source` [..., k, n]. `apply` and `apply_transpose` are the two maps; `matrix` is the
    first one. There are no marginals, and `fuse`, which makes its maps from couplings, does not take them.
    """

    to_target: ArrayLike
    to_source: ArrayLike

    def matrix(self) -> Array:
        """The map [..., n, k] to the first side."""
        return jnp.asarray(self.to_target)

    def apply_transpose(self, x: Array) -> Array:
        """to_source x for x [..., n, d]."""
        return _matmul(jnp.asarray(self.to_source), x)
