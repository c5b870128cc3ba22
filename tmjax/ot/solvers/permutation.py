"""An entropic coupling rounded to the permutation nearest to it (Mena et al. 2018, the limit of Gumbel-Sinkhorn)."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from tmjax.ot.plan import MatchPlan
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.solvers.assignment import require_uniform
from tmjax.ot.solvers.base import ResultProperties, require_equal_sizes
from tmjax.ot.solvers.sinkhorn import Sinkhorn


@functools.partial(jax.jit, static_argnames="solver")
def _entropic(problem: Problem, solver: Sinkhorn) -> tuple[OTResult, jax.Array]:
    result = Sinkhorn.solve_from(solver, problem, problem.start)
    return result, result.plan.attach(problem).matrix()


@dataclass(frozen=True)
class Permutation(Sinkhorn):
    """The permutation P of largest <P, Q> for the entropic coupling Q: the nearest to it in Frobenius norm.

    Unlike `assignment` it prefers matches that stand out from the alternatives of both units, not only cheap ones; it
    tends to `assignment` as epsilon -> 0. `converged` includes that Q did.
    """

    name: ClassVar[str] = "permutation"
    properties: ClassVar[ResultProperties] = ResultProperties(exact_limit=True)

    def check_shape(self, n: int, k: int) -> None:
        """Raises InputError unless n = k."""
        require_equal_sizes(self.name, n, k)

    def solve_on_host(self, problem: Problem) -> OTResult:
        """Solves one problem [n, n] of NumPy arrays; raises InputError if the marginals are not uniform."""
        require_uniform(problem, self.name)
        result, q = _entropic(problem, self)
        # A coupling that is not finite (kernel mode at too small an epsilon) gives some permutation, not converged.
        _, columns = linear_sum_assignment(np.nan_to_num(np.asarray(q, np.float64)), maximize=True)
        return certify(
            problem,
            MatchPlan.of(columns, problem),
            iterations=result.iterations,
            threshold=1e-6,
            solver_converged=result.converged,
        )
