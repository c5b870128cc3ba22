"""Matching of unequally many units: exact linear assignment, and every unit left over joins its cheapest partner."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import linear_sum_assignment

from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.solvers.assignment import require_uniform
from tmjax.ot.solvers.base import ResultProperties
from tmjax.ot.sparse import EdgePlan


def cover_edges(cost_nk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (rows [E], columns [E]), E = max(n, k), in which every row and every column of a cost [n, k] occurs.

    The smaller side is assigned one to one at the least total cost; of the larger side, what is left over goes to the
    cheapest of the other side each. Sorted by the larger side.
    """
    cost = np.asarray(cost_nk, np.float64)
    flip = cost.shape[0] < cost.shape[1]
    wide = cost.T if flip else cost
    partner = np.argmin(wide, axis=1)
    rows, columns = linear_sum_assignment(wide)
    partner[rows] = columns
    every = np.arange(len(wide))
    return (partner, every) if flip else (every, partner)


@dataclass(frozen=True)
class Cover:
    """The optimal permutation of equally many units; else a cover, in which units of the smaller side have several.

    For exact copies with duplicated units it is the exact correspondence: plans become maps by dividing by the mass of
    rows and columns, so that duplicates share their original's mass. All matches have the same mass, so the marginals
    are uniform only for n = k: they are reported, not judged.
    """

    name: ClassVar[str] = "cover"
    properties: ClassVar[ResultProperties] = ResultProperties(balanced=False, rows=False)

    def solve_on_host(self, problem: Problem) -> OTResult:
        """Solves one problem [n, k] of NumPy arrays; raises InputError if the marginals are not uniform."""
        require_uniform_sides(problem, self.name)
        rows, columns = cover_edges(problem.cost)
        plan = EdgePlan.of(rows, columns, np.full(len(rows), 1 / len(rows)), problem.cost.shape)
        return certify(problem, plan, iterations=1, threshold=1e-6, judged="")


def require_uniform_sides(problem: Problem, name: str) -> None:
    """Raises InputError unless the units of each side have the same mass."""
    for masses in (problem.a, problem.b):
        require_uniform(Problem(problem.cost, masses, masses), name)
