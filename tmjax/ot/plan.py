"""What a solver finds, in the form it finds it: potentials, a dense coupling or low-rank factors.

All axes before the last two (of matrices) or the last (of vectors) are independent problems.
"""

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


class Plan:
    """A coupling Q [..., n, k], applied from either side."""

    def matrix(self) -> Array:
        """Q [..., n, k]."""
        raise NotImplementedError

    def apply(self, x: Array) -> Array:
        """Q x for x [..., k, d]: moves values on the second side to the first."""
        return _matmul(self.matrix(), x)

    def apply_transpose(self, x: Array) -> Array:
        """Q^T x for x [..., n, d]: moves values on the first side to the second."""
        return _matmul(jnp.swapaxes(self.matrix(), -1, -2), x)

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
