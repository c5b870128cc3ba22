"""Entropic Gromov-Wasserstein: units matched by how they relate to their own model's others (Peyré et al. 2016)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from tmjax.ot.cost import correlation
from tmjax.ot.plan import DensePlan
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.solvers import ott_jax
from tmjax.ot.solvers.base import ResultProperties
from tmjax.typing import Array


def intra_costs(zx: Array, zy: Array) -> tuple[ott_jax.Geometry, ott_jax.Geometry]:
    """Costs within the sides, 1 - correlation(zx, zx) [n, n] and 1 - correlation(zy, zy) [k, k]."""
    return tuple(ott_jax.Geometry(cost_matrix=1.0 - correlation(z, z)) for z in (zx, zy))


@dataclass(frozen=True)
class GromovWasserstein:
    """min over Q of sum (Cx_ik - Cy_jl)^2 Q_ij Q_kl - epsilon H(Q), C = 1 - correlation within a side.

    Each of at most `outer_iterations` linearisations is solved by Sinkhorn (`threshold`, `max_iterations`), until the
    objective changes by less than `outer_threshold` of itself. The rows of the two sides need not be paired: the
    problem's own cost is used for the reported `transport_cost` only. Not convex: a stationary point from a b^T, found
    without randomness. `iterations` counts linearisations. Squared differences of correlations are small: where the
    coupling is nearly a b^T, epsilon is too large.
    """

    name: ClassVar[str] = "gw"
    properties: ClassVar[ResultProperties] = ResultProperties()

    epsilon: float = 0.01
    threshold: float = 1e-5
    max_iterations: int = 2000
    outer_iterations: int = 100
    outer_threshold: float = 1e-4

    def quadratic(self, problem: Problem, zx: Array, zy: Array) -> ott_jax.QuadraticProblem:
        """The quadratic problem of ott-jax."""
        return ott_jax.QuadraticProblem(*intra_costs(zx, zy), a=problem.a, b=problem.b)

    def solve_features(self, problem: Problem, zx: Array, zy: Array) -> OTResult:
        """Solves one problem [n, k] under `jit`."""
        method = ott_jax.GromovWasserstein(
            linear_solver=ott_jax.Sinkhorn(threshold=self.threshold, max_iterations=self.max_iterations),
            epsilon=self.epsilon,
            threshold=self.outer_threshold,
            max_iterations=self.outer_iterations,
            warm_start=True,
        )
        out = method(self.quadratic(problem, zx, zy))
        done = jnp.sum(out.costs != -1)
        # Float32 noise of the coupling, as `certify` reckons it for potentials that are kept.
        last = out.linear_state
        largest = sum(jnp.max(jnp.abs(term)) for term in (last.f, last.g, last.geom.cost_matrix)) / self.epsilon
        # Dense: its potentials belong to the last linearised cost, which is as large as the coupling.
        return certify(
            problem,
            DensePlan(out.matrix),
            iterations=done,
            threshold=self.threshold,
            epsilon=self.epsilon,
            # Not ott-jax's own flag, which asks that no Sinkhorn on the way ever ran out of iterations: what counts is
            # that the objective settled and that the coupling returned has its marginals.
            solver_converged=done < self.outer_iterations,
            exponents=largest,
        )
