"""Entropic optimal transport by Sinkhorn's iterations, as implemented in ott-jax (Cuturi 2013; Cuturi et al. 2022)."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from tmjax.ot.plan import EntropicPlan
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify

with warnings.catch_warnings():
    # ott-jax imports jaxopt, which announces its retirement on import.
    warnings.filterwarnings("ignore", message="JAXopt is no longer maintained", category=DeprecationWarning)
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn


@dataclass(frozen=True)
class Sinkhorn:
    """Sinkhorn in the log domain: stops when the L1 marginal error is below `threshold` or after `max_iterations`."""

    name: ClassVar[str] = "sinkhorn"

    epsilon: float = 0.1
    threshold: float = 1e-6
    max_iterations: int = 2000

    def solve_one(self, problem: Problem) -> OTResult:
        """Solves one problem [n, k] under `jit`."""
        linear = linear_problem.LinearProblem(
            geometry.Geometry(cost_matrix=problem.cost, epsilon=self.epsilon), a=problem.a, b=problem.b
        )
        method = sinkhorn.Sinkhorn(threshold=self.threshold, max_iterations=self.max_iterations, lse_mode=True)
        out = method(linear)
        plan = EntropicPlan(out.f, out.g, jnp.float32(self.epsilon))
        return certify(problem, plan, iterations=out.n_iters, threshold=self.threshold, epsilon=self.epsilon)
