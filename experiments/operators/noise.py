"""An operator outside the package, in one file: noise on one projection.

The recipe beside it names this file; doctor, controls, update table and report find the operator by that name.
"""

from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from pydantic import Field

from tmjax.recipes.base import PositiveFloat, Role, Section
from tmjax.transfer.contribution import Applied, Context, Shape
from tmjax.transfer.source_view import SourceView
from tmjax.typing import Params


class NoiseOptions(Section):
    """Options of the operator `noise`."""

    role: Annotated[Role, Field(description="Projection that gets the noise.")] = "o"
    scale: Annotated[PositiveFloat, Field(description="Standard deviation, over that of the weights.")] = 0.01


class Noise:
    """Normal noise on the weights of one projection in all layers."""

    name: ClassVar[str] = "noise"
    options: ClassVar[type[Section]] = NoiseOptions
    needs: ClassVar[frozenset[str]] = frozenset()
    chooses: ClassVar[bool] = False

    def apply(self, params: Params, source: SourceView, options: NoiseOptions, context: Context) -> Applied:
        """Adds the noise; see `operator.Operator`."""
        path = context.target.projections[options.role].path
        weight = jnp.asarray(params[path], jnp.float32)
        noise = options.scale * jnp.std(weight) * jax.random.normal(jax.random.key(context.seed), weight.shape)
        return Applied({**params, path: weight + noise}, facts={"scale": options.scale})

    def memory(self, target: Shape, source: Shape, options: NoiseOptions, batch_tokens: int) -> int:
        """Estimates the bytes of the noise: no projection is larger than an MLP's."""
        return 4 * target.spec.layers * target.spec.hidden * max(target.spec.mlp, target.spec.axis_size("heads"))
