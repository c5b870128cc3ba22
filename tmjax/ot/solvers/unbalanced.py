"""Unbalanced entropic transport: marginals are asked for, not enforced (Chizat et al. 2018; Séjourné et al. 2019)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from tmjax.errors import InputError
from tmjax.ot.plan import EntropicPlan
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.solvers.base import ResultProperties
from tmjax.ot.solvers.sinkhorn import Sinkhorn
from tmjax.typing import Array


@dataclass(frozen=True)
class Unbalanced(Sinkhorn):
    """Sinkhorn with KL penalties epsilon tau / (1 - tau) on the marginals' errors; tau = 1 enforces that marginal.

    Units without a good match may lose mass. The marginal errors are reported; `converged` is the solver's word (the
    relative change of its iterates is below `threshold`, or the marginal error where one tau is 1) and that all is
    finite.
    """

    name: ClassVar[str] = "unbalanced"
    properties: ClassVar[ResultProperties] = ResultProperties(balanced=False, rows=False, potentials=True)

    tau_a: float = 0.9
    tau_b: float = 0.9

    def __post_init__(self) -> None:
        """Raises InputError for options outside their ranges."""
        super().__post_init__()
        if not (0 < self.tau_a <= 1 and 0 < self.tau_b <= 1):
            raise InputError(f"tau_a and tau_b must lie in (0, 1], not {self.tau_a} and {self.tau_b}")

    def solve_from(self, problem: Problem, start: tuple[Array, Array] | None) -> OTResult:
        """Solves one problem [n, k] under `jit`."""
        out = self.iterate(problem, problem.cost, start, tau_a=self.tau_a, tau_b=self.tau_b)
        return certify(
            problem,
            EntropicPlan(out.f, out.g, jnp.float32(self.epsilon)),
            iterations=out.n_iters,
            threshold=self.threshold,
            epsilon=self.epsilon,
            judged="",
            solver_converged=out.converged,
        )
