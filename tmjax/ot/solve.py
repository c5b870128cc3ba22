"""`solve`: any problem, any solver, always a certificate."""

import functools

import jax
import jax.numpy as jnp

from tmjax.errors import InputError, NonFiniteError
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult
from tmjax.ot.solvers import Solver
from tmjax.typing import Array


def solve(problem: Problem, solver: Solver) -> OTResult:
    """Solves one problem [n, k] or a batch [..., n, k]; each problem stops by itself.

    Nothing is silent: `converged`, the iterations and the marginal errors are per problem. Raises InputError for shapes
    that do not fit and NonFiniteError for NaN or infinite costs (solvers would return finite nonsense for them).
    """
    *batch, n, k = problem.cost.shape
    if problem.a.shape != (*batch, n) or problem.b.shape != (*batch, k):
        raise InputError(
            f"marginals {problem.a.shape}, {problem.b.shape} do not fit a cost of shape {problem.cost.shape}"
        )
    if not bool(_all_finite(problem.cost)):
        raise NonFiniteError("the transport cost holds NaN or infinity; look for them in the activations")
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]), problem)
    result = _solve_batch(flat, solver)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), result).attach(problem)


@jax.jit
def _all_finite(x: Array) -> Array:
    return jnp.isfinite(x).all()


@functools.partial(jax.jit, static_argnames="solver")
def _solve_batch(problem: Problem, solver: Solver) -> OTResult:
    if hasattr(solver, "solve_batch"):
        return solver.solve_batch(problem)
    # One after the other, not vmapped: in a vmapped while loop every problem pays for the slowest.
    return jax.lax.map(solver.solve_one, problem)
