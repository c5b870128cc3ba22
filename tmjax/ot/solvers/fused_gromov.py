"""Fused Gromov-Wasserstein: the structure within each model and the cost between them at once (Vayer et al. 2019)."""

from dataclasses import dataclass
from typing import ClassVar

from tmjax.errors import InputError
from tmjax.ot.problem import Problem
from tmjax.ot.solvers import ott_jax
from tmjax.ot.solvers.gromov import GromovWasserstein, intra_costs
from tmjax.typing import Array


@dataclass(frozen=True)
class FusedGromovWasserstein(GromovWasserstein):
    """Gromov-Wasserstein plus `fused_penalty` times the linear cost <cost, Q>; otherwise as `gw`."""

    name: ClassVar[str] = "fgw"

    fused_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raises InputError for a penalty that is not positive."""
        if not self.fused_penalty > 0:
            raise InputError(f"fused_penalty must be positive, not {self.fused_penalty}; `gw` is the case of 0")

    def quadratic(self, problem: Problem, zx: Array, zy: Array) -> ott_jax.QuadraticProblem:
        """The quadratic problem of ott-jax, with its linear part."""
        return ott_jax.QuadraticProblem(
            *intra_costs(zx, zy),
            ott_jax.Geometry(cost_matrix=problem.cost),
            fused_penalty=self.fused_penalty,
            a=problem.a,
            b=problem.b,
        )
