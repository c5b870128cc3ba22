"""Signed transport: units that correlate negatively are matched too, and their sign goes with them."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from tmjax.ot.plan import SignedPlan, unsigned
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.solvers.base import ResultProperties
from tmjax.ot.solvers.sinkhorn import Sinkhorn
from tmjax.typing import Array


@dataclass(frozen=True)
class Signed(Sinkhorn):
    """Sinkhorn at cost 1 - |rho|, read off a cost 1 - rho, and sign(rho) |Q| as the plan.

    A feature and its negation carry the same information and the sign of a residual-stream unit is arbitrary (cf. the
    signed permutations of Li et al. 2016, "Convergent learning", and Ainsworth et al. 2023). The certificate and the
    transport cost are those of |Q| at cost 1 - |rho|.
    """

    name: ClassVar[str] = "signed"
    properties: ClassVar[ResultProperties] = ResultProperties(signed=True, potentials=True)

    def solve_from(self, problem: Problem, start: tuple[Array, Array] | None) -> OTResult:
        """Solves one problem [n, k] under `jit`."""
        out = self.iterate(problem, unsigned(problem.cost), start)
        plan = SignedPlan(out.f, out.g, jnp.float32(self.epsilon))
        return certify(problem, plan, iterations=out.n_iters, threshold=self.threshold, epsilon=self.epsilon)
