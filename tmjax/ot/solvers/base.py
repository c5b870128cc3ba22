"""The interface of a solver, and what a solver says of itself."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult


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
    `host`: runs in NumPy, one problem after the other, not under `jit`.
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


def capabilities_of(solver: "Solver | type[Solver]") -> Capabilities:
    """What a solver declares; one that declares nothing finds plain couplings."""
    return getattr(solver, "capabilities", Capabilities())


class Solver(Protocol):
    """A frozen dataclass of options; hashable, so that it is a static argument of jitted functions.

    A solver may also have `solve_batch`, for problems with one leading axis; without it they are solved in turn.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def solve_one(self, problem: Problem) -> OTResult:
        """Solves one problem (no leading axes): under `jit`, or, if `capabilities.host`, with NumPy arrays."""
        ...
