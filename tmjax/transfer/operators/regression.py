"""Closed-form fusion: weights that turn the target's inputs into the source's mapped outputs, by least squares.

In the manner of RegMean (Jin et al. 2023), with the source's outputs y seen through the plans instead of the source's
inputs: W^ = argmin |W X - Y|^2 + ridge tr(G) / n |W - W_T|^2, X [n, N] the centred inputs of the target, G = X X^T and
Y = M_out (y - mu') the centred mapped outputs of the source, averaged over its layers: W^ = W_T + (Y - W_T X) X^T
(G + ridge tr(G) / n I)^-1. The bias keeps the mean output: b^ = mu_out - W^ mu_in.
"""

from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from tmjax.align.alignment import Alignment
from tmjax.models.spec import ParamSpec
from tmjax.recipes.base import PositiveFloat, Section
from tmjax.transfer.contribution import Context, Contribution, Shape
from tmjax.transfer.maps import dot, mapped_outputs, side
from tmjax.transfer.projections import (
    ProjectionOptions,
    base_params,
    projection_contribution,
    projections_memory,
    transport_projections,
)
from tmjax.transfer.source_view import PairedActivations, SourceView
from tmjax.typing import Array, ArrayLike, Params


class RegressionOptions(ProjectionOptions):
    """Options of the operator `regression`."""

    ridge: Annotated[
        PositiveFloat,
        Field(description="Penalty that holds the weights at the target's, in units of the inputs' mean square."),
    ] = 0.1


@jax.jit
def least_squares(x_rn: Array, y_ro: Array, w_on: Array, ridge: Array) -> Array:
    """Solves for W^ [out, n] from centred inputs [N, n] and goal outputs [N, out] around W [out, n]; float32."""
    gram = dot(x_rn.T, x_rn)
    n = gram.shape[0]
    left = dot((y_ro - dot(x_rn, w_on.T)).T, x_rn)
    factor = jax.scipy.linalg.cho_factor(gram + (ridge * jnp.trace(gram) / n + 1e-30) * jnp.eye(n))
    return w_on + jax.scipy.linalg.cho_solve(factor, left.T).T


def regress_projection(
    alignment: Alignment, row: ParamSpec, weight: ArrayLike, activations: PairedActivations, *, ridge: float
) -> tuple[Array, Array]:
    """Solves for W^ [L, out, in] and b^ [L, out] of one projection of the target, whose stacked weight is given."""
    out = side(alignment, row.output_site)
    weights = np.asarray(alignment.layer_plans[row.role].weights)
    inputs, outputs = activations.target.layers_of(row.input_site), activations.source.layers_of(row.output_site)
    solved, biases = [], []
    for layer, shares in enumerate(weights):
        x = jnp.asarray(inputs[layer], jnp.float32)
        mean_in = jnp.mean(x, axis=0)
        old = jnp.asarray(weight[layer], jnp.float32)
        if not shares.any():  # no partner: the mask leaves the layer as it is
            solved.append(old)
            biases.append(jnp.zeros(old.shape[0]))
            continue
        goal = jnp.zeros((x.shape[0], old.shape[0]))
        for m in np.nonzero(shares)[0]:
            y = jnp.asarray(outputs[m], jnp.float32)
            goal = goal + shares[m] * mapped_outputs(out, layer, int(m), y)
        fitted = least_squares(x - mean_in, goal - jnp.mean(goal, axis=0), old, jnp.float32(ridge))
        solved.append(fitted)
        mean_out = jnp.asarray(alignment.target[row.output_site].mean)[layer]
        biases.append(mean_out - dot(fitted, mean_in))
    return jnp.stack(solved), jnp.stack(biases)


class Regression:
    """Weights that by least squares turn the target's inputs into the source's mapped outputs."""

    name: ClassVar[str] = "regression"
    options: ClassVar[type[Section]] = RegressionOptions
    needs: ClassVar[frozenset[str]] = frozenset({"alignment", "activations"})
    chooses: ClassVar[bool] = False

    def contribute(
        self, params: Params, source: SourceView, options: RegressionOptions, context: Context
    ) -> Contribution:
        """Solves for every projection; see `operator.Contributor`."""
        target, alignment, activations = context.target, source.alignment(), source.activations()

        def make(row: ParamSpec) -> tuple[Array, Array]:
            return regress_projection(alignment, row, params[row.path], activations, ridge=options.ridge)

        base = base_params(options, context)
        items = transport_projections(alignment, target.rows, params, source.model.rows, options, make, base)
        return projection_contribution(target, options, items)

    def memory(self, target: Shape, source: Shape, options: RegressionOptions, batch_tokens: int) -> int:
        """Estimates the bytes of the solved weights."""
        return projections_memory(target, source, options)


OPERATOR = Regression()
