"""Entropic optimal transport by Sinkhorn's iterations, as implemented in ott-jax (Cuturi 2013; Cuturi et al. 2022)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from tmjax.errors import InputError
from tmjax.ot.plan import EntropicPlan
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult, certify
from tmjax.ot.solvers import ott_jax
from tmjax.ot.solvers.base import ResultProperties
from tmjax.typing import Array


@dataclass(frozen=True)
class Sinkhorn:
    """Sinkhorn: stops when the L1 marginal error is below `threshold` or after `max_iterations`.

    `lse_mode`: in the log domain; otherwise with the kernel exp(-cost / epsilon), faster, and useless where that
    underflows (the certificate then says not converged). `momentum`: over-relaxation (Thibault et al. 2021; 1 is none,
    above 1 is faster) from iteration `momentum_start` on. `anderson`: iterates that Anderson's acceleration mixes (0 is
    none; Chizat et al. 2020). `epsilon_start` > 1 starts from that multiple of epsilon, multiplied by `epsilon_decay`
    in every iteration until it is epsilon (Schmitzer 2019). `Problem.start` is a warm start.
    """

    name: ClassVar[str] = "sinkhorn"
    properties: ClassVar[ResultProperties] = ResultProperties(exact_limit=True, entropic=True, potentials=True)

    epsilon: float = 0.1
    threshold: float = 1e-6
    max_iterations: int = 2000
    lse_mode: bool = True
    momentum: float = 1.0
    momentum_start: int = 0
    anderson: int = 0
    epsilon_start: float = 1.0
    epsilon_decay: float = 0.95

    def __post_init__(self) -> None:
        """Raises InputError for options outside their ranges or that exclude each other."""
        if not (self.epsilon > 0 and self.threshold > 0 and self.max_iterations > 0):
            raise InputError("epsilon, threshold and max_iterations must be positive")
        if not 0 < self.momentum < 2:
            raise InputError(f"momentum must lie between 0 and 2, not {self.momentum}")
        if self.momentum != 1 and self.anderson:
            raise InputError("momentum and anderson exclude each other; choose one")
        if not (self.epsilon_start >= 1 and 0 < self.epsilon_decay <= 1):
            raise InputError("epsilon_start must be at least 1 and epsilon_decay lie in (0, 1]")
        if self.epsilon_start > 1 and self.epsilon_decay == 1:
            raise InputError("with epsilon_decay 1 epsilon never comes down from epsilon_start")

    def iterate(
        self,
        problem: Problem,
        cost: Array,
        start: tuple[Array, Array] | None,
        *,
        tau_a: float = 1.0,
        tau_b: float = 1.0,
    ) -> ott_jax.SinkhornOutput:
        """ott-jax's output for one problem at `cost` [n, k]; tau < 1 relaxes a marginal (see `unbalanced`)."""
        # Without a schedule a plain number: ott-jax evaluates schedules in every iteration.
        scheduled = self.epsilon_start > 1
        epsilon = ott_jax.Epsilon(self.epsilon, self.epsilon_start, self.epsilon_decay) if scheduled else self.epsilon
        linear = ott_jax.LinearProblem(
            ott_jax.Geometry(cost_matrix=cost, epsilon=epsilon), a=problem.a, b=problem.b, tau_a=tau_a, tau_b=tau_b
        )
        accelerated = self.momentum != 1
        method = ott_jax.Sinkhorn(
            threshold=self.threshold,
            max_iterations=self.max_iterations,
            lse_mode=self.lse_mode,
            momentum=ott_jax.Momentum(start=self.momentum_start, value=self.momentum) if accelerated else None,
            anderson=ott_jax.AndersonAcceleration(memory=self.anderson) if self.anderson else None,
        )
        if start is not None and not self.lse_mode:
            start = tuple(jnp.exp(potential / self.epsilon) for potential in start)
        return method(linear, init=start)

    def solve_from(self, problem: Problem, start: tuple[Array, Array] | None) -> OTResult:
        """Solves one problem [n, k] under `jit`."""
        out = self.iterate(problem, problem.cost, start)
        plan = EntropicPlan(out.f, out.g, jnp.float32(self.epsilon))
        return certify(problem, plan, iterations=out.n_iters, threshold=self.threshold, epsilon=self.epsilon)
