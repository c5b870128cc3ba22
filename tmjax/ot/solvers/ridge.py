"""Ridge regression in both directions, the linear baseline (Hoerl and Kennard 1970)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from tmjax.errors import InputError
from tmjax.ot.plan import LinearMap
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify_map
from tmjax.ot.solvers.base import ResultProperties
from tmjax.typing import Array


def _regress(z: Array, on: Array, penalty: float) -> Array:
    """The W [n, k] of least ||z - on W^T||^2 + penalty ||W||^2; through the smaller of the two Gram matrices."""
    highest = jax.lax.Precision.HIGHEST
    rows, k = on.shape
    if k <= rows:
        gram = jnp.matmul(on.T, on, precision=highest) + penalty * jnp.eye(k)
        return jax.scipy.linalg.solve(gram, jnp.matmul(on.T, z, precision=highest), assume_a="pos").T
    gram = jnp.matmul(on, on.T, precision=highest) + penalty * jnp.eye(rows)
    return jnp.matmul(on.T, jax.scipy.linalg.solve(gram, z, assume_a="pos"), precision=highest).T


@dataclass(frozen=True)
class Ridge:
    """Least squares between standardised units with `penalty` in units of one unit's variance over all rows."""

    name: ClassVar[str] = "ridge"
    properties: ClassVar[ResultProperties] = ResultProperties(balanced=False, rows=False, map_only=True, signed=True)

    penalty: float = 0.1

    def __post_init__(self) -> None:
        """Raises InputError for a penalty with which float32 would not solve the normal equations."""
        if not self.penalty >= 1e-4:
            raise InputError(f"penalty must be at least 1e-4, not {self.penalty}")

    def solve_features(self, problem: Problem, zx: Array, zy: Array) -> OTResult:
        """Solves one problem [n, k] under `jit`; the cost is not used."""
        return certify_map(LinearMap(_regress(zx, zy, self.penalty), _regress(zy, zx, self.penalty)))
