"""The interface of a solver."""

from typing import ClassVar, Protocol

from tmjax.ot.problem import Problem
from tmjax.ot.result import OTResult


class Solver(Protocol):
    """A frozen dataclass of options; hashable, so that it is a static argument of jitted functions.

    A solver may also have `solve_batch`, for problems with one leading axis; without it they are solved in turn.
    """

    name: ClassVar[str]

    def solve_one(self, problem: Problem) -> OTResult:
        """Solves one problem (no leading axes) under `jit`."""
        ...
