"""Exact transport between equally many units of equal mass: linear assignment (Kuhn 1955; Crouse 2016, in scipy)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import linear_sum_assignment

from tmjax.errors import InputError
from tmjax.ot.plan import MatchPlan
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.solvers.base import ResultProperties, require_equal_sizes


def require_uniform(problem: Problem, name: str) -> None:
    """Raises InputError unless all units of both sides have the same mass."""
    masses = np.concatenate([problem.a, problem.b])
    if not np.allclose(masses, masses.mean(), rtol=1e-5):
        raise InputError(f"solver {name!r} matches units one to one: it needs uniform marginals")


@dataclass(frozen=True)
class Assignment:
    """The optimal permutation, which is an optimal coupling of uniform marginals (Birkhoff), in float64 on the host."""

    name: ClassVar[str] = "assignment"
    properties: ClassVar[ResultProperties] = ResultProperties(exact_limit=True)

    def check_shape(self, n: int, k: int) -> None:
        """Raises InputError unless n = k."""
        require_equal_sizes(self.name, n, k)

    def solve_on_host(self, problem: Problem) -> OTResult:
        """Solves one problem [n, n] of NumPy arrays; raises InputError if the marginals are not uniform."""
        require_uniform(problem, self.name)
        _, columns = linear_sum_assignment(np.asarray(problem.cost, np.float64))
        return certify(problem, MatchPlan.of(columns, problem), iterations=1, threshold=1e-6)
