"""The registry of solvers: one file per method. Every solver in a module of this folder is found by its name.

Solvers of other packages are found by an entry point of the group `tmjax.solvers`, or by `package.module:Class` or
`FILE.py:Class`.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import ModuleType
from typing import Any

from tmjax.errors import InputError
from tmjax.ot.solvers.base import (
    EachSolver,
    FeatureSolver,
    HostSolver,
    MemoryBoundSolver,
    PlainSolver,
    ResultProperties,
    ShapeCheckingSolver,
    Solver,
    WarmStartSolver,
)
from tmjax.plugins import load_plugin, offered

#: Group of entry points under which packages offer solvers.
ENTRY_POINTS = "tmjax.solvers"
_SOLVES = (PlainSolver, WarmStartSolver, FeatureSolver, HostSolver)


def _is_solver(value: object) -> bool:
    named = isinstance(value, type) and is_dataclass(value) and isinstance(vars(value).get("name"), str)
    return named and issubclass(value, _SOLVES)


def _solvers_of(module: ModuleType) -> Iterator[type[Solver]]:
    """Solvers that a module defines."""
    yield from (value for value in vars(module).values() if _is_solver(value) and value.__module__ == module.__name__)


_MODULES = [importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]
#: The solvers of this folder, by name.
SOLVERS: Mapping[str, type[Solver]] = {
    solver.name: solver
    for solver in sorted((each for module in _MODULES for each in _solvers_of(module)), key=lambda each: each.name)
}


def solver_class(name: str) -> type[Solver]:
    """Finds a solver.

    Args:
        name: A name of this registry or of an entry point, `package.module:Class` or `FILE.py:Class`.

    Raises:
        InputError: There is none, with the list of solvers, or it cannot be imported, or it is no solver.
    """
    if name in SOLVERS:
        return SOLVERS[name]
    solver = load_plugin(name, ENTRY_POINTS, "solver")
    if solver is None:
        known = ", ".join((*SOLVERS, *sorted(offered(ENTRY_POINTS))))
        raise InputError(f"solver {name!r} is not known; known are {known}")
    if not _is_solver(solver):
        raise InputError(
            f"solver {name!r} is no frozen dataclass with a name, properties and a method that solves; see"
            " tmjax.ot.solvers.base"
        )
    return solver


def solver_options(name: str) -> dict[str, Any]:
    """The options of a solver with their defaults; raises InputError as `solver_class` does."""
    return {field.name: field.default for field in fields(solver_class(name))}


def make_solver(name: str, **options: Any) -> Solver:
    """Makes a solver from its name and options.

    Raises:
        InputError: There is no such solver or option, or a value is of another type or out of range.
    """
    known = solver_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        has = ", ".join(known) or "none"
        raise InputError(f"solver {name!r} has no option {', '.join(map(repr, unknown))}; its options are {has}")
    return solver_class(name)(**{key: _value(name, key, value, known[key]) for key, value in options.items()})


def _value(name: str, key: str, value: Any, default: Any) -> Any:
    """The value as the type of the option's default, so that a recipe's `1` is as good as `1.0`."""
    if default is MISSING or default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise InputError(f"solver {name!r}: {key} must be of type {type(default).__name__}, not {value!r}")


__all__ = [
    "SOLVERS",
    "EachSolver",
    "FeatureSolver",
    "HostSolver",
    "MemoryBoundSolver",
    "PlainSolver",
    "ResultProperties",
    "ShapeCheckingSolver",
    "Solver",
    "WarmStartSolver",
    "make_solver",
    "solver_class",
    "solver_options",
]
