"""`solve`: any problem, any solver, always a certificate."""

import functools

import jax
import jax.numpy as jnp

from tmjax.errors import InputError, NonFiniteError
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult
from tmjax.ot.solvers import Solver
from tmjax.ot.solvers.base import FeatureSolver, HostSolver, check_shape, prepared, solve_each
from tmjax.typing import Array


def solve(problem: Problem, solver: Solver) -> OTResult:
    """Solves one problem [n, k] or a batch [..., n, k]; each problem stops by itself.

    Nothing is silent: `converged`, the iterations and the marginal errors are per problem. Raises InputError for shapes
    that do not fit or that the solver does not take, and NonFiniteError for NaN or infinite costs, marginals or
    features (solvers would return finite nonsense for them).
    """
    problem = _checked(problem, solver)
    batch = problem.cost.shape[:-2]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]), problem)
    result = _solve_host(flat, solver) if isinstance(solver, HostSolver) else _solve_batch(flat, solver)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), result).attach(problem)


def _checked(problem: Problem, solver: Solver) -> Problem:
    """The problem with only what the solver uses; raises if it is not one that it can solve."""
    *batch, n, k = problem.cost.shape
    if problem.a.shape != (*batch, n) or problem.b.shape != (*batch, k):
        raise InputError(
            f"marginals {problem.a.shape}, {problem.b.shape} do not fit a cost of shape {problem.cost.shape}"
        )
    check_shape(solver, n, k)
    if isinstance(solver, FeatureSolver) and problem.features is None:
        raise InputError(f"solver {solver.name!r} needs the activations of both sides (Problem.features)")
    problem = prepared(problem, solver)
    if problem.features is not None:
        zx, zy = (x.shape for x in problem.features)
        if zx[:-1] != zy[:-1] or (*zx[:-2], zx[-1], zy[-1]) != (*batch, n, k):
            raise InputError(f"features {zx}, {zy} do not fit a cost of shape {problem.cost.shape}")
    if problem.start is not None and tuple(x.shape for x in problem.start) != (problem.a.shape, problem.b.shape):
        raise InputError(f"start {[x.shape for x in problem.start]} does not fit a cost of shape {problem.cost.shape}")
    if not bool(_all_finite(problem.cost)):
        raise NonFiniteError("the transport cost holds NaN or infinity; look for them in the activations")
    if not bool(_all_finite((problem.a, problem.b, problem.features, problem.start))):
        raise NonFiniteError("marginals, features or starting potentials hold NaN or infinity")
    return problem


@jax.jit
def _all_finite(tree: object) -> Array:
    leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, leaves)


@functools.partial(jax.jit, static_argnames="solver")
def _solve_batch(problem: Problem, solver: Solver) -> OTResult:
    return solve_each(solver, lambda index: jax.tree.map(lambda x: x[index], problem), problem.a.shape[0])


def _solve_host(problem: Problem, solver: HostSolver) -> OTResult:
    problem = jax.device_get(problem)
    results = [
        solver.solve_on_host(jax.tree.map(lambda x, index=index: x[index], problem))
        for index in range(problem.a.shape[0])
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *results)
