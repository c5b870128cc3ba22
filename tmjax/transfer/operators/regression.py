"""Closed-form fusion: weights that turn the target's inputs into the source's mapped outputs, by least squares.

In the manner of RegMean (Jin et al. 2023), with the source's outputs y seen through the plans instead of the source's
inputs: W^ = argmin |W X - Y|^2 + ridge tr(G) / n |W - W_T|^2, X [n, N] the centred inputs of the target, G = X X^T and
Y = M_out (y - mu') the centred mapped outputs of the source, averaged over its layers: W^ = W_T + (Y - W_T X) X^T
(G + ridge tr(G) / n I)^-1. The bias keeps the mean output: b^ = mu_out - W^ mu_in.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.activations.store import Activations
from tmjax.align.alignment import Alignment, plan_site
from tmjax.models.spec import ParamSpec
from tmjax.transfer.operators.transport import Side, mapped_outputs, side
from tmjax.typing import Array, ArrayLike

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def least_squares(x_rn: Array, y_ro: Array, w_on: Array, ridge: Array) -> Array:
    """W^ [out, n] of centred inputs [N, n] and wanted outputs [N, out] around W [out, n]; float32."""
    gram = _dot(x_rn.T, x_rn)
    n = gram.shape[0]
    left = _dot((y_ro - _dot(x_rn, w_on.T)).T, x_rn)
    factor = jax.scipy.linalg.cho_factor(gram + (ridge * jnp.trace(gram) / n + 1e-30) * jnp.eye(n))
    return w_on + jax.scipy.linalg.cho_solve(factor, left.T).T


def regress_projection(
    alignment: Alignment,
    row: ParamSpec,
    weight: ArrayLike,
    target: Activations,
    source: Activations,
    *,
    ridge: float,
    source_rows: np.ndarray | None = None,
    permutations: dict[str, np.ndarray] | None = None,
) -> tuple[Array, Array]:
    """W^ [L, out, in] and b^ [L, out] of one projection of the target, whose stacked weight is given.

    `source_rows` reorders the source's rows and `permutations` its units, for controls.
    """
    out: Side = side(alignment, row.output_site, (permutations or {}).get(plan_site(row.output_site)))
    weights = np.asarray(alignment.layer_plans[row.role].weights)
    inputs, outputs = target.site(row.input_site), source.site(row.output_site)
    found, biases = [], []
    for layer, shares in enumerate(weights):
        x = jnp.asarray(inputs[layer], jnp.float32)
        mean_in = jnp.mean(x, axis=0)
        old = jnp.asarray(weight[layer], jnp.float32)
        if not shares.any():  # no partner: the mask leaves the layer as it is
            found.append(old)
            biases.append(jnp.zeros(old.shape[0]))
            continue
        wanted = jnp.zeros((x.shape[0], old.shape[0]))
        for m in np.nonzero(shares)[0]:
            y = outputs[m] if source_rows is None else outputs[m][source_rows]
            wanted = wanted + shares[m] * mapped_outputs(out, layer, int(m), jnp.asarray(y, jnp.float32))
        fitted = least_squares(x - mean_in, wanted - jnp.mean(wanted, axis=0), old, jnp.float32(ridge))
        found.append(fitted)
        mean_out = jnp.asarray(alignment.target[row.output_site].mean)[layer]
        biases.append(mean_out - _dot(fitted, mean_in))
    return jnp.stack(found), jnp.stack(biases)
