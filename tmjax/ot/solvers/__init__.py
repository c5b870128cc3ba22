"""The registry of solvers: one file per method, found here by name."""

from collections.abc import Mapping
from typing import Any

from tmjax.errors import InputError
from tmjax.ot.solvers.base import Solver
from tmjax.ot.solvers.sinkhorn import Sinkhorn

SOLVERS: Mapping[str, type[Solver]] = {solver.name: solver for solver in (Sinkhorn,)}


def make_solver(name: str, **options: Any) -> Solver:
    """A solver by name with its options; raises InputError with the list of names."""
    if name not in SOLVERS:
        raise InputError(f"solver {name!r} is not known; known are {', '.join(sorted(SOLVERS))}")
    return SOLVERS[name](**options)


__all__ = ["SOLVERS", "Solver", "make_solver"]
