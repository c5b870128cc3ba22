"""Orthogonal Procrustes: the rotation that brings one side closest to the other (Schönemann 1966)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from tmjax.ot.cost import correlation
from tmjax.ot.plan import LinearMap
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify_map
from tmjax.ot.solvers.base import ResultProperties
from tmjax.typing import Array


@dataclass(frozen=True)
class Procrustes:
    """R = U V^T of the correlations U S V^T between standardised units: x ~ R y, y ~ R^T x.

    For n != k a partial isometry. Directions with singular values below `tolerance` of the largest are left out: there
    the rotation is arbitrary (units that are constant, fewer rows than units).
    """

    name: ClassVar[str] = "procrustes"
    properties: ClassVar[ResultProperties] = ResultProperties(balanced=False, rows=False, map_only=True, signed=True)

    tolerance: float = 1e-5

    def solve_features(self, problem: Problem, zx: Array, zy: Array) -> OTResult:
        """Solves one problem [n, k] under `jit`; the cost is not used."""
        u, s, vt = jnp.linalg.svd(correlation(zx, zy), full_matrices=False)
        kept = jnp.where(s > self.tolerance * s[0], 1.0, 0.0)
        rotation = jnp.matmul(u * kept, vt, precision="highest")
        return certify_map(LinearMap(rotation, rotation.T))
