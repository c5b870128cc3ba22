"""The registry of solvers: one file per method, found here by name."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from tmjax.errors import InputError
from tmjax.ot.solvers.assignment import Assignment
from tmjax.ot.solvers.base import Capabilities, Solver, capabilities_of
from tmjax.ot.solvers.cover import Cover
from tmjax.ot.solvers.fused_gromov import FusedGromovWasserstein
from tmjax.ot.solvers.greedy import Greedy
from tmjax.ot.solvers.gromov import GromovWasserstein
from tmjax.ot.solvers.lowrank import LowRank
from tmjax.ot.solvers.lowrank_gromov import LowRankGromovWasserstein
from tmjax.ot.solvers.network_simplex import NetworkSimplex
from tmjax.ot.solvers.permutation import Permutation
from tmjax.ot.solvers.procrustes import Procrustes
from tmjax.ot.solvers.ridge import Ridge
from tmjax.ot.solvers.scaling import Scaling
from tmjax.ot.solvers.signed import Signed
from tmjax.ot.solvers.sinkhorn import Sinkhorn
from tmjax.ot.solvers.unbalanced import Unbalanced

_ALL: tuple[type[Solver], ...] = (
    Sinkhorn,
    Scaling,
    Unbalanced,
    Signed,
    LowRank,
    GromovWasserstein,
    FusedGromovWasserstein,
    LowRankGromovWasserstein,
    Assignment,
    Cover,
    NetworkSimplex,
    Permutation,
    Greedy,
    Ridge,
    Procrustes,
)
SOLVERS: Mapping[str, type[Solver]] = {solver.name: solver for solver in _ALL}


def solver_options(name: str) -> dict[str, Any]:
    """The options of a solver with their defaults; raises InputError with the list of solvers."""
    if name not in SOLVERS:
        raise InputError(f"solver {name!r} is not known; known are {', '.join(SOLVERS)}")
    return {field.name: field.default for field in fields(SOLVERS[name])}


def make_solver(name: str, **options: Any) -> Solver:
    """A solver by name with its options; raises InputError for names, options and values that there are not."""
    known = solver_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        has = ", ".join(known) or "none"
        raise InputError(f"solver {name!r} has no option {', '.join(map(repr, unknown))}; its options are {has}")
    return SOLVERS[name](**{key: _value(name, key, value, known[key]) for key, value in options.items()})


def _value(name: str, key: str, value: Any, default: Any) -> Any:
    """The value as the type of the option's default, so that a recipe's `1` is as good as `1.0`."""
    if default is MISSING or default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise InputError(f"solver {name!r}: {key} must be of type {type(default).__name__}, not {value!r}")


__all__ = ["SOLVERS", "Capabilities", "Solver", "capabilities_of", "make_solver", "solver_options"]
