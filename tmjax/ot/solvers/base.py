"""The interface of a solver, as protocols: one method that solves, and further ones for further capabilities.

A solver is a frozen dataclass of options with a `name` and the `properties` of its results; hashable, so that it is a
static argument of jitted functions. It solves one problem (no leading axes) by one of

* `solve_one(problem)`, from the cost and the marginals (`PlainSolver`),
* `solve_from(problem, start)`, which can begin from potentials (`WarmStartSolver`),
* `solve_features(problem, zx, zy)`, which needs the standardised activations (`FeatureSolver`),

under `jit`, or by `solve_on_host(problem)`, in NumPy (`HostSolver`). It may also solve many problems by `solve_each`
(`EachSolver`), keep to a limit of memory (`MemoryBoundSolver`) and refuse shapes (`ShapeCheckingSolver`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp

from tmjax.errors import InputError
from tmjax.ot.cost import cost_matrix
from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult
from tmjax.typing import Array


@dataclass(frozen=True)
class ResultProperties:
    """Properties of every result of a solver, which the property tests of the registry check.

    Attributes:
        balanced: Both marginals of the plan are a and b.
        rows: The first marginal is a.
        symmetric: Problems with their sides swapped have the transposed plan.
        equivariant: Permuting units permutes the plan with them (not where a random start belongs to positions).
        exact_limit: The transport cost tends to that of an optimal plan as epsilon -> 0 (or is optimal at once).
        entropic: The plan solves the balanced entropic problem, so all such solvers agree.
        signed: Entries may be negative; marginals are those of |Q|.
        map_only: Results are linear maps, not couplings.
        potentials: Plans are `EntropicPlan`s.
    """

    balanced: bool = True
    rows: bool = True
    symmetric: bool = True
    equivariant: bool = True
    exact_limit: bool = False
    entropic: bool = False
    signed: bool = False
    map_only: bool = False
    potentials: bool = False


class Solver(Protocol):
    """The part that all solvers have."""

    name: ClassVar[str]
    properties: ClassVar[ResultProperties]


@runtime_checkable
class PlainSolver(Protocol):
    """Solves from the cost and the marginals."""

    def solve_one(self, problem: Problem) -> OTResult:
        """Solves one problem [n, k] under `jit`."""
        ...


@runtime_checkable
class WarmStartSolver(Protocol):
    """Solves from given potentials, too."""

    def solve_from(self, problem: Problem, start: tuple[Array, Array] | None) -> OTResult:
        """Solves one problem [n, k] under `jit`, starting at potentials f [n] and g [k] unless they are None."""
        ...


@runtime_checkable
class FeatureSolver(Protocol):
    """Compares units within each side, or fits maps, and so needs activations."""

    def solve_features(self, problem: Problem, zx: Array, zy: Array) -> OTResult:
        """Solves one problem [n, k] under `jit`, given its standardised activations [N, n] and [N, k]."""
        ...


@runtime_checkable
class HostSolver(Protocol):
    """Runs in NumPy, one problem after the other."""

    def solve_on_host(self, problem: Problem) -> OTResult:
        """Solves one problem [n, k] of NumPy arrays."""
        ...


@runtime_checkable
class EachSolver(Protocol):
    """Solves many problems in its own way; it gets costs as they are, `FeatureCost`s too."""

    def solve_each(
        self, get: Callable[[Array], Problem], count: int, finish: Callable[[Array, Problem, OTResult], object]
    ) -> object:
        """Does as the function `solve_each`; under `jit`."""
        ...


@runtime_checkable
class MemoryBoundSolver(Protocol):
    """Keeps to a limit of memory."""

    def with_memory(self, mib: int) -> Self:
        """The same solver with another limit."""
        ...

    def form(self, shape: tuple[int, int], count: int, rows: int = 0) -> tuple[bool, bool, int]:
        """The form in which `count` problems [n, k] with `rows` rows of activations fit: cost kept, kernel kept, number
        of problems solved together. Raises InputError if they do not.
        """
        ...


@runtime_checkable
class ShapeCheckingSolver(Protocol):
    """Takes problems of some shapes only."""

    def check_shape(self, n: int, k: int) -> None:
        """Raises InputError for problems [n, k] that the solver does not take."""
        ...


def check_shape(solver: Solver, n: int, k: int) -> None:
    """Raises InputError for problems [n, k] that a solver does not take."""
    if isinstance(solver, ShapeCheckingSolver):
        solver.check_shape(n, k)


def require_equal_sizes(name: str, n: int, k: int) -> None:
    """Raises InputError unless n = k; for solvers that match units one to one."""
    if n != k:
        raise InputError(f"solver {name!r} matches units one to one: it needs equal sizes, not {n} and {k}")


def prepared(problem: Problem, solver: Solver) -> Problem:
    """The problem with only the parts that the solver uses, in the form that it takes."""
    return replace(
        problem,
        cost=problem.cost if isinstance(solver, EachSolver) else cost_matrix(problem.cost),
        features=problem.features if isinstance(solver, FeatureSolver) else None,
        start=problem.start if isinstance(solver, WarmStartSolver) else None,
    )


def solve_prepared(problem: Problem, solver: Solver) -> OTResult:
    """Solves one prepared problem under `jit`, by the method that the solver has."""
    if isinstance(solver, FeatureSolver):
        return solver.solve_features(problem, *problem.features)
    if isinstance(solver, WarmStartSolver):
        return solver.solve_from(problem, problem.start)
    return solver.solve_one(problem)


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

    def prepare(index: Array) -> Problem:
        return prepared(get(index), solver)

    if isinstance(solver, EachSolver):
        return solver.solve_each(prepare, count, finish)

    def one(index: Array) -> object:
        problem = prepare(index)
        return finish(index, problem, solve_prepared(problem, solver))

    return jax.lax.map(one, jnp.arange(count))
