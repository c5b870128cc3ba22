"""Transfer operators: their interface, the operators of this package and others by name, and operator lists.

A merge is a list of operators, applied in order, as an optax optimiser is a chain of transformations. An operator is
one file: its options, its needs, `apply` (or `contribute`) and its memory estimate. Recipes, doctor, sweep, controls,
update table and report go by this interface alone.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from tmjax.errors import InputError
from tmjax.plugins import code_hash, load_plugin, offered, plugin_file
from tmjax.recipes.base import Section, checked
from tmjax.recipes.merge import Recipe
from tmjax.transfer import operators
from tmjax.transfer.contribution import Applied, Context, Contribution, Shape
from tmjax.transfer.source_view import SourceView
from tmjax.typing import Params

#: Group of entry points under which packages offer operators.
ENTRY_POINTS = "tmjax.operators"
#: Parts of the source that an operator may need, by the names of the fields of `SourceView`.
NEEDS = ("alignment", "activations", "features", "token_map", "teacher")


class Described(Protocol):
    """The description that every operator has.

    Attributes:
        name: Its name in recipes.
        options: Its options, a Section whose fields have descriptions.
        needs: Parts of the source that it asks for, of `NEEDS`. With the need of an alignment it has to read the
            source's activations through the plans: only then do controls leave their units in order.
        chooses: Whether it chooses on validation texts; such an operator is left out at a fixed alpha.
    """

    name: ClassVar[str]
    options: ClassVar[type[Section]]
    needs: ClassVar[frozenset[str]]
    chooses: ClassVar[bool]

    def memory(self, target: Shape, source: Shape, options: Any, batch_tokens: int) -> int:
        """Estimates the bytes that it holds beside the parameters.

        Args:
            target: Architecture and tensors of the target.
            source: Those of the source.
            options: An object of the class `options`.
            batch_tokens: Tokens per batch of a forward pass.

        Returns:
            Bytes at the peak.
        """
        ...


@runtime_checkable
class Operator(Described, Protocol):
    """An operator that changes parameters by itself."""

    def apply(self, params: Params, source: SourceView, options: Any, context: Context) -> Applied:
        """Applies the operator.

        Args:
            params: The target's parameters as the operators before have left them.
            source: The view of the source in this arm. Results computed from it are multiplied by
                `source.contribution`.
            options: An object of the class `options`.
            context: Target, validation loss, devices, seed.

        Returns:
            Parameters, manifest entries and rows of the update table.
        """
        ...


@runtime_checkable
class Contributor(Described, Protocol):
    """An operator whose result enters with coefficients, which are chosen jointly with those of its neighbours.

    A sweep assigns coefficients before it asks for a contribution: to the roles of the aligned projections, or to those
    that the operator's method `roles(options)` returns. An operator that contributes to other roles, or to fewer, needs
    this method, which is no part of the protocol.
    """

    def contribute(self, params: Params, source: SourceView, options: Any, context: Context) -> Contribution:
        """Computes the contribution of the source.

        Args:
            params: The target's parameters as the operators before have left them.
            source: The source, as this arm may know it.
            options: An object of the class `options`.
            context: Target, validation loss, devices, seed.

        Returns:
            Items by role, and the rule by which they enter parameters; coefficients are chosen by the chain.
        """
        ...


@dataclass(frozen=True)
class Step:
    """One entry of an operator list: the operator and its options."""

    operator: Operator | Contributor
    options: Any

    @property
    def contributes(self) -> bool:
        """Whether coefficients are chosen for it."""
        return isinstance(self.operator, Contributor)


Chain = tuple[Step, ...]


def contributed_roles(step: Step, aligned: Iterable[str]) -> frozenset[str]:
    """Returns the roles that an operator contributes to.

    Args:
        step: The operator and its options.
        aligned: Roles of the aligned projections, to which an operator without a method `roles` contributes.
    """
    own = getattr(step.operator, "roles", None)
    return frozenset(aligned if own is None else own(step.options))


@functools.cache
def builtin_operators() -> Mapping[str, Operator | Contributor]:
    """Finds the operators of this package: every module of `transfer.operators` with an `OPERATOR`.

    Returns:
        The operators by name.
    """
    modules = [
        importlib.import_module(f"{operators.__name__}.{entry.name}")
        for entry in pkgutil.iter_modules(operators.__path__)
    ]
    provided = [module.OPERATOR for module in modules if hasattr(module, "OPERATOR")]
    return {operator.name: operator for operator in provided}


def find_operator(name: str) -> Operator | Contributor:
    """Finds an operator.

    Args:
        name: A name of this package's, of an entry point of the group `tmjax.operators`, a dotted path
            `package.module:NAME`, or `FILE.py:NAME`; NAME is an operator or its class.

    Returns:
        The operator.

    Raises:
        InputError: There is none, or it lacks a part of the interface.
    """
    builtin = builtin_operators()
    if name in builtin:
        return builtin[name]
    plugin = load_plugin(name, ENTRY_POINTS, "operator")
    if plugin is None:
        known = ", ".join((*builtin, *sorted(offered(ENTRY_POINTS))))
        raise InputError(f"operator {name!r} is not known; known are {known}")
    operator = plugin() if isinstance(plugin, type) else plugin
    lacking = [part for part in ("name", "options", "needs", "chooses", "memory") if not hasattr(operator, part)]
    if not isinstance(operator, Operator | Contributor):
        lacking += ["apply or contribute"]
    if lacking:
        raise InputError(f"operator {name!r} lacks {', '.join(lacking)}")
    if set(operator.needs) - set(NEEDS):
        raise InputError(
            f"operator {name!r} needs {', '.join(sorted(set(operator.needs) - set(NEEDS)))}, "
            f"which no source has; there are {', '.join(NEEDS)}"
        )
    return operator


def code_hashes(chain: Chain) -> dict[str, str]:
    """Hashes the files of operators outside this package; they are inputs of a result.

    Args:
        chain: The operators of a recipe.

    Returns:
        SHA-256 of the file by operator name.
    """
    hashes = {step.operator.name: code_hash(type(step.operator)) for step in chain}
    return {name: digest for name, digest in hashes.items() if digest is not None}


def operators_of(recipe: Recipe) -> Chain:
    """Reads the operators of a recipe; a file that is named relatively is taken from its stored place.

    Args:
        recipe: The recipe.

    Returns:
        All its operators with their checked options, in order.

    Raises:
        InputError: As `read_chain`.
    """
    return read_chain(recipe.operators, recipe.place)


def read_chain(entries: Iterable[Any], place_of: Callable[[str], str] = str) -> Chain:
    """Reads an operator list.

    Args:
        entries: `{name: options}` each, or a name alone where no option is set.
        place_of: Gives the present path of the file of an operator `FILE.py:NAME`.

    Returns:
        Operators with their checked options, in order.

    Raises:
        InputError: An operator is not known, or options are wrong; all faults of an entry in one line.
    """
    steps = []
    for number, entry in enumerate(entries):
        place = f"operators.{number}"
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise InputError(f"recipe: {place}: write one operator per entry, as - transport: {{...}}")
        ((name, values),) = entry.items()
        file = plugin_file(str(name))
        located = name if file is None else f"{place_of(file)}{name.removeprefix(file)}"
        operator = find_operator(located)
        steps.append(Step(operator, checked(operator.options, dict(values or {}), place=f"{place}.{operator.name}")))
    return tuple(steps)
