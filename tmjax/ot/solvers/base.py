"""The interface of a solver, and what a solver says of itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from tmjax.ot.cost import cost_matrix
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult
from tmjax.typing import Array


@dataclass(frozen=True)
class Capabilities:
    """What holds for every result of a solver; the property tests of the registry go by it.

    `balanced`: both marginals of the plan are a and b. `rows`: at least the first one is a.
    `symmetric`: problems with their sides swapped have the transposed plan. `equivariant`: permuting units permutes the
    plan with them (not where a random start belongs to positions).
    `exact_limit`: the transport cost tends to that of an optimal plan as epsilon -> 0 (or is optimal at once).
    `entropic`: the plan solves the balanced entropic problem, so all such solvers agree.
    `signed`: entries may be negative; marginals are those of |Q|. `map_only`: linear maps, not a coupling.
    `equal_sizes`: refuses n != k. `needs_features`: uses `Problem.features`. `warm_start`: uses `Problem.start`.
    `host`: runs in NumPy, one problem after the other, not under `jit`. `feature_cost`: takes a `FeatureCost` as it is;
    for the others it is written out. `potentials`: its plans are `EntropicPlan`s.
    """

    balanced: bool = True
    rows: bool = True
    symmetric: bool = True
    equivariant: bool = True
    exact_limit: bool = False
    entropic: bool = False
    signed: bool = False
    map_only: bool = False
    equal_sizes: bool = False
    needs_features: bool = False
    warm_start: bool = False
    host: bool = False
    feature_cost: bool = False
    potentials: bool = False


def capabilities_of(solver: "Solver | type[Solver]") -> Capabilities:
    """What a solver declares; one that declares nothing finds plain couplings."""
    return getattr(solver, "capabilities", Capabilities())


class Solver(Protocol):
    """A frozen dataclass of options; hashable, so that it is a static argument of jitted functions.

    A solver may also have `solve_each(get, count, finish)`, for problems in numbers (see `solve_each`).
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def solve_one(self, problem: Problem) -> OTResult:
        """Solves one problem (no leading axes): under `jit`, or, if `capabilities.host`, with NumPy arrays."""
        ...


def prepared(problem: Problem, solver: Solver) -> Problem:
    """The problem with only what the solver uses, in the form that it takes."""
    can = capabilities_of(solver)
    return replace(
        problem,
        cost=problem.cost if can.feature_cost else cost_matrix(problem.cost),
        features=problem.features if can.needs_features else None,
        start=problem.start if can.warm_start else None,
    )


def solve_each(
    solver: Solver,
    get: Callable[[Array], Problem],
    count: int,
    finish: Callable[[Array, Problem, OTResult], object] = lambda _index, _problem, result: result,
) -> object:
    """`finish(index, problem, result)` of the problems `get(0)` .. `get(count - 1)`, stacked; under `jit`.

    Problems are made when they are solved, so that memory holds no more of them than the solver works on at a time. One
    after the other, not vmapped: in a vmapped while loop every problem pays for the slowest.
    """

    def wanted(index: Array) -> Problem:
        return prepared(get(index), solver)

    if hasattr(solver, "solve_each"):
        return solver.solve_each(wanted, count, finish)

    def one(index: Array) -> object:
        problem = wanted(index)
        return finish(index, problem, solver.solve_one(problem))

    return jax.lax.map(one, jnp.arange(count))
