"""Arguments and results of operators."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from tmjax.checkpoints.model import Model
from tmjax.models.spec import DecoderSpec, ParamSpec
from tmjax.recipes.merge import CoefficientOptions
from tmjax.sharding.mesh import Layout
from tmjax.transfer.update_table import Table
from tmjax.typing import Array, ArrayLike, Params

#: alpha and beta of each role: numbers, or arrays that broadcast to the stacked weight (see `coefficients.learned`).
Coefficients = Mapping[str, tuple[ArrayLike | float, ArrayLike | float]]
#: Loss of parameters on a batch, a traceable function.
BatchLoss = Callable[[Params, Any], Array]


@dataclass(frozen=True)
class Shape:
    """A model without its weights, for estimates: architecture and table of tensors."""

    spec: DecoderSpec
    param_specs: tuple[ParamSpec, ...]


@dataclass(frozen=True)
class Context:
    """Inputs of operators beside the source.

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
    coefficients: CoefficientOptions = field(default_factory=CoefficientOptions)
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
            of the source's contribution over the target's, decides whether a merge counts as a transfer. None: the
            size of the operator's change of every tensor, in a column of its name.
    """

    params: Params
    facts: Mapping[str, Any] = field(default_factory=dict)
    rows: Callable[[Params], Table] | None = None


class Rule(Protocol):
    """The way in which items of a contribution enter parameters; hashable, so that all arms share compiled programs."""

    def __call__(self, params: Params, items: Any, coefficients: Coefficients) -> dict[str, ArrayLike]:
        """Fuses the items in; traceable.

        Args:
            params: All parameters before.
            items: Items of the contribution by role.
            coefficients: alpha and beta by role.

        Returns:
            All parameters after.
        """
        ...

    def scaled(self, items: Any, factor: float) -> Any:
        """Multiplies the source's contribution.

        Args:
            items: Items of the contribution by role.
            factor: The factor.

        Returns:
            Items of the same structure.
        """
        ...

    def rows(
        self,
        target: Params,
        fused: Params,
        items: Any,
        coefficients: Coefficients,
    ) -> Table:
        """Makes the rows of the update table.

        Args:
            target: Parameters of the target before the first operator.
            fused: Parameters after the items were fused in.
            items: Items of the contribution by role.
            coefficients: alpha and beta by role.

        Returns:
            Columns by the Hugging Face name of every tensor.
        """
        ...


@dataclass(frozen=True)
class Contribution:
    """A change of parameters, linear in coefficients alpha and beta that are chosen for each role.

    Attributes:
        items: By role, a pytree of arrays.
        rule: How they enter parameters.
        projections: Of the roles that are projections, their rows in the target's table.
    """

    items: Mapping[str, Any]
    rule: Rule
    projections: Mapping[str, ParamSpec] = field(default_factory=dict)
