"""Low-rank Gromov-Wasserstein, as implemented in ott-jax (Scetbon, Peyré and Cuturi 2022)."""

from dataclasses import dataclass
from typing import ClassVar

from tmjax.ot.plan import LowRankPlan
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.solvers import ott_jax
from tmjax.ot.solvers.base import ResultProperties
from tmjax.ot.solvers.gromov import intra_costs
from tmjax.ot.solvers.lowrank import EVERY, settled
from tmjax.typing import Array


@dataclass(frozen=True)
class LowRankGromovWasserstein:
    """Gromov-Wasserstein over couplings q diag(1/g) r^T of `rank`; options as for `lowrank`, costs as for `gw`.

    `max_iterations` replaces ott-jax's 100000 with at least 10000 of them.
    """

    name: ClassVar[str] = "lrgw"
    properties: ClassVar[ResultProperties] = ResultProperties(symmetric=False, equivariant=False)

    epsilon: float = 0.001
    threshold: float = 1e-6
    max_iterations: int = 2000
    rank: int = 16
    gamma: float = 10.0
    marginal_threshold: float = 1e-5
    marginal_iterations: int = 10000

    def solve_features(self, problem: Problem, zx: Array, zy: Array) -> OTResult:
        """Solves one problem [n, k] under `jit`."""
        method = ott_jax.LRGromovWasserstein(
            rank=min(self.rank, *problem.cost.shape),
            gamma=self.gamma,
            epsilon=self.epsilon,
            threshold=self.threshold,
            inner_iterations=EVERY,
            min_iterations=min(50, self.max_iterations),
            max_iterations=self.max_iterations,
            kwargs_dys={"tolerance": self.marginal_threshold, "max_iter": self.marginal_iterations},
        )
        out = method(ott_jax.QuadraticProblem(*intra_costs(zx, zy), a=problem.a, b=problem.b))
        return certify(
            problem,
            LowRankPlan(out.q, out.r, out.g),
            iterations=out.n_iters,
            threshold=self.marginal_threshold,
            epsilon=self.epsilon,
            solver_converged=settled(out.errors, out.n_iters, out.converged, self.threshold, EVERY),
        )
