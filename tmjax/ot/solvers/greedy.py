"""Top-1 matching: every target unit takes the source unit that it correlates with best.

The "semi-matching" of Li et al. 2016, "Convergent learning: Do different neural networks learn the same
representations?".
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from tmjax.ot.plan import MatchPlan
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.solvers.base import ResultProperties


@dataclass(frozen=True)
class Greedy:
    """The cheapest source unit for every target unit, however often it is taken; the first of equals.

    The least cost that any plan with the marginal a can have. The second marginal is not b: its error is reported, not
    judged.
    """

    name: ClassVar[str] = "greedy"
    properties: ClassVar[ResultProperties] = ResultProperties(balanced=False, symmetric=False)

    def solve_one(self, problem: Problem) -> OTResult:
        """Solves one problem [n, k] under `jit`."""
        columns = jnp.argmin(problem.cost, axis=1)
        return certify(problem, MatchPlan.of(columns, problem), iterations=1, threshold=1e-6, judged="a")
