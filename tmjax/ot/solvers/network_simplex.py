"""Exact transport by the network simplex of POT (Bonneel et al. 2011; Flamary et al. 2021), on the host."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tmjax.errors import InputError
from tmjax.ot.plan import DensePlan
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.solvers.base import ResultProperties


@dataclass(frozen=True)
class NetworkSimplex:
    """An optimal coupling in float64, a vertex of the polytope; needs POT (`pip install tmjax[bench]`).

    Raises InputError where POT is missing. `converged` includes that POT found the optimum within `max_iterations`.
    """

    name: ClassVar[str] = "network_simplex"
    properties: ClassVar[ResultProperties] = ResultProperties(exact_limit=True)

    max_iterations: int = 1_000_000

    def solve_on_host(self, problem: Problem) -> OTResult:
        """Solves one problem [n, k] of NumPy arrays."""
        try:
            import ot as pot  # here, not above: POT is an extra, and it imports PyTorch where that is installed
        except ImportError:
            raise InputError("solver 'network_simplex' needs POT; install tmjax[bench] or the package POT") from None
        a, b, cost = (np.asarray(x, np.float64) for x in (problem.a, problem.b, problem.cost))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its warning (no optimum found) is in the log
            q, log = pot.emd(a, b * (a.sum() / b.sum()), cost, numItermax=self.max_iterations, log=True)
        return certify(
            problem,
            DensePlan(np.asarray(q, np.float32)),
            iterations=1,
            threshold=1e-6,
            solver_converged=log["warning"] is None,
        )
