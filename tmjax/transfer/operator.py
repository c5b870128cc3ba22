"""Transfer operators: the interface, what they are given and what they return, and how they are found by name.

A merge is a list of operators, applied in order, as an optax optimiser is a chain of transformations. An operator is
one file: its options, its needs, `apply` (or `contribute`) and its memory estimate. Recipes, doctor, sweep, controls,
update table and report go by this interface alone.
"""

import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.models.spec import DecoderSpec, ParamSpec
from tmjax.recipes.base import Section
from tmjax.recipes.merge import CoefficientOptions
from tmjax.sharding.mesh import Layout
from tmjax.transfer import operators
from tmjax.transfer.source_view import SourceView
from tmjax.transfer.update_table import Table
from tmjax.typing import Array, ArrayLike, Params

#: Group of entry points under which packages offer operators.
ENTRY_POINTS = "tmjax.operators"
#: What an operator may ask of the source, by the names of the fields of `SourceView`.
NEEDS = ("alignment", "activations", "token_map", "teacher")
#: Loss of parameters on a batch, a traceable function.
BatchLoss = Callable[[Params, Any], Array]


@dataclass(frozen=True)
class Shape:
    """A model without its weights, for estimates: architecture and table of tensors."""

    spec: DecoderSpec
    param_specs: tuple[ParamSpec, ...]


@dataclass(frozen=True)
class Context:
    """What operators are given beside the source.

    Attributes:
        target: The target as it was before the first operator.
        loss: Bits per byte of parameters on the validation texts; None where nothing is chosen on them.
        screen: The same on a part of these texts, by which candidates are compared first.
        alpha: Fixed coefficient of everything that is transported; None: coefficients are chosen.
        coefficients: How they are chosen.
        training: Calibration batches and the target's loss on one, for learned coefficients.
        known_v: Rows [V] bool of the target's embedding that are tokens; None: all.
        batch_tokens: Tokens per batch of a forward pass.
        dtype: Dtype that forward passes compute in.
        layout: Devices.
        seed: Seed of everything random.
        progress: Called with steps done and steps in all.
        load_model: Loads a checkpoint that options name.
    """

    target: Model
    loss: Callable[[Params], float] | None = None
    screen: Callable[[Params], float] | None = None
    alpha: float | None = None
    coefficients: CoefficientOptions = CoefficientOptions()
    training: tuple[Iterable[Any], BatchLoss] | None = None
    known_v: np.ndarray | None = None
    batch_tokens: int = 4096
    dtype: jnp.dtype = jnp.float32
    layout: Layout = field(default_factory=Layout)
    seed: int = 0
    progress: Callable[[int, int], None] = lambda done, total: None
    load_model: Callable[[str], Model] | None = None


@dataclass(frozen=True)
class Applied:
    """The result of an operator.

    Attributes:
        params: All parameters after it.
        facts: Entries of the manifest, under the operator's name.
        rows: From the parameters after the last operator, the rows of the update table that this operator knows:
            Hugging Face name of a tensor -> column -> value. Columns of its own are allowed. `source_part`, the norm
            of the source's contribution over the target's, decides whether a merge counts as a transfer.
    """

    params: Params
    facts: Mapping[str, Any] = field(default_factory=dict)
    rows: Callable[[Params], Table] = lambda params: {}


class Rule(Protocol):
    """How the items of a contribution enter parameters; hashable, so that all arms run the same compiled programs."""

    def __call__(
        self, params: Params, items: Any, coefficients: Mapping[str, tuple[ArrayLike | float, ArrayLike | float]]
    ) -> dict[str, ArrayLike]:
        """Returns the parameters with the items fused in; traceable."""
        ...

    def scaled(self, items: Any, factor: float) -> Any:
        """Returns the items with the source's contribution multiplied by a factor."""
        ...

    def rows(
        self,
        target: Params,
        fused: Params,
        items: Any,
        coefficients: Mapping[str, tuple[ArrayLike | float, ArrayLike | float]],
    ) -> Table:
        """Returns the rows of the update table."""
        ...


@dataclass(frozen=True)
class Contribution:
    """What an operator adds to parameters, linear in coefficients alpha and beta that are chosen for each role.

    Attributes:
        items: By role, a pytree of arrays.
        rule: How they enter parameters.
        projections: Of the roles that are projections, their rows in the target's table.
    """

    items: Mapping[str, Any]
    rule: Rule
    projections: Mapping[str, ParamSpec] = field(default_factory=dict)


class Described(Protocol):
    """What every operator says of itself.

    Attributes:
        name: Its name in recipes.
        options: Its options, a Section whose fields have descriptions.
        needs: What it asks of the source; of `NEEDS`.
        chooses: Whether it chooses on validation texts; such an operator is left out at a fixed alpha.
    """

    name: ClassVar[str]
    options: ClassVar[type[Section]]
    needs: ClassVar[frozenset[str]]
    chooses: ClassVar[bool]

    def memory(self, target: Shape, source: Shape, options: Any, batch_tokens: int) -> int:
        """Estimates the bytes that it holds beside the parameters."""
        ...


@runtime_checkable
class Operator(Described, Protocol):
    """An operator that changes parameters by itself."""

    def apply(self, params: Params, source: SourceView, options: Any, context: Context) -> Applied:
        """Applies the operator.

        Args:
            params: The target's parameters as the operators before have left them.
            source: The source, as this arm may know it. What is computed from it is multiplied by
                `source.contribution`.
            options: An object of the class `options`.
            context: Target, validation loss, devices, seed.

        Returns:
            Parameters, manifest entries and rows of the update table.
        """
        ...


@runtime_checkable
class Contributor(Described, Protocol):
    """An operator whose result enters with coefficients, which are chosen jointly with those of its neighbours."""

    def contribute(self, params: Params, source: SourceView, options: Any, context: Context) -> Contribution:
        """Computes what the source contributes; arguments as those of `Operator.apply`."""
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


@functools.cache
def builtin_operators() -> Mapping[str, Operator | Contributor]:
    """Finds the operators of this package: every module of `transfer.operators` with an `OPERATOR`."""
    modules = [
        importlib.import_module(f"{operators.__name__}.{entry.name}") for entry in pkgutil.iter_modules(operators.__path__)
    ]
    found = [module.OPERATOR for module in modules if hasattr(module, "OPERATOR")]
    return {operator.name: operator for operator in found}


def find_operator(name: str) -> Operator | Contributor:
    """Finds an operator.

    Args:
        name: A name of this package's, of an entry point of the group `tmjax.operators`, a dotted path
            `package.module:NAME`, or `FILE.py:NAME`; NAME is an operator or its class.

    Raises:
        InputError: There is none, or it lacks a part of the interface.
    """
    builtin = builtin_operators()
    if name in builtin:
        return builtin[name]
    offered = {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINTS)}
    if name in offered:
        found = offered[name].load()
    elif ":" in name:
        found = _imported(name)
    else:
        raise InputError(f"operator {name!r} is not known; known are {', '.join((*builtin, *sorted(offered)))}")
    operator = found() if isinstance(found, type) else found
    lacking = [part for part in ("name", "options", "needs", "chooses", "memory") if not hasattr(operator, part)]
    if not isinstance(operator, Operator | Contributor):
        lacking += ["apply or contribute"]
    if lacking:
        raise InputError(f"operator {name!r} lacks {', '.join(lacking)}")
    if set(operator.needs) - set(NEEDS):
        raise InputError(f"operator {name!r} needs {', '.join(sorted(set(operator.needs) - set(NEEDS)))}, "
                         f"which no source has; there are {', '.join(NEEDS)}")
    return operator


def _imported(name: str) -> Any:
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            module = _module_of(Path(place).expanduser())
        else:
            module = importlib.import_module(place)
        return getattr(module, attribute)
    except (ImportError, AttributeError, OSError) as error:
        raise InputError(f"operator {name!r} cannot be imported: {error}") from None


def _module_of(file: Path) -> Any:
    if not file.is_file():
        raise OSError(f"{file} does not exist")
    name = f"tmjax_operator_{file.stem}"
    known = sys.modules.get(name)
    if known is not None and Path(known.__file__ or "") == file.resolve():
        return known
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def read_chain(entries: Iterable[Any]) -> Chain:
    """Reads an operator list: `[{name: options}, ...]`, or a name alone where no option is set.

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
        operator = find_operator(name)
        steps.append(Step(operator, checked(operator.options, dict(values or {}), place=f"{place}.{operator.name}")))
    return tuple(steps)
