"""Couplings of low nonnegative rank, as implemented in ott-jax (Scetbon, Cuturi and Peyré 2021)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from tmjax.ot.plan import LowRankPlan
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.solvers import ott_jax
from tmjax.ot.solvers.base import ResultProperties
from tmjax.typing import Array

#: Iterations between two looks at the change.
EVERY = 10


def settled(errors: Array, iterations: Array, converged: Array, threshold: float, every: int) -> Array:
    """Whether a low-rank run of ott-jax ended settled; its `errors` come every so many iterations.

    Its own `converged` asks that the change still shrinks, which it cannot where there is nothing to find (one unit).
    """
    last = errors[jnp.maximum(iterations // every - 1, 0)]
    return converged | ((last >= 0) & (last < threshold))


@dataclass(frozen=True)
class LowRank:
    """Low-rank Sinkhorn: Q = q diag(1/g) r^T of `rank` (at most n and k), by mirror descent from a random start.

    `epsilon` is the entropy on the factors (not on Q), `gamma` the step. The problem is not convex: it is solved to a
    stationary point, which depends on the start (fixed here). Stops when the factors change by less than `threshold`
    (generalised Jensen-Shannon divergence); the marginals are held to `marginal_threshold` by at most
    `marginal_iterations` of Dykstra's in every step (most of the time goes there), and the certificate judges them by
    it.
    """

    name: ClassVar[str] = "lowrank"
    properties: ClassVar[ResultProperties] = ResultProperties(symmetric=False, equivariant=False)

    epsilon: float = 0.01
    threshold: float = 1e-6
    max_iterations: int = 2000
    rank: int = 16
    gamma: float = 10.0
    marginal_threshold: float = 1e-5
    marginal_iterations: int = 10000

    def solve_one(self, problem: Problem) -> OTResult:
        """Solves one problem [n, k] under `jit`."""
        linear = ott_jax.LinearProblem(
            ott_jax.Geometry(cost_matrix=problem.cost, epsilon=self.epsilon), a=problem.a, b=problem.b
        )
        method = ott_jax.LRSinkhorn(
            rank=min(self.rank, *problem.cost.shape),
            gamma=self.gamma,
            epsilon=self.epsilon,
            threshold=self.threshold,
            inner_iterations=EVERY,
            max_iterations=self.max_iterations,
            kwargs_dys={"tolerance": self.marginal_threshold, "max_iter": self.marginal_iterations},
        )
        out = method(linear)
        return certify(
            problem,
            LowRankPlan(out.q, out.r, out.g),
            iterations=out.n_iters,
            threshold=self.marginal_threshold,
            epsilon=self.epsilon,
            solver_converged=settled(out.errors, out.n_iters, out.converged, self.threshold, EVERY),
        )
