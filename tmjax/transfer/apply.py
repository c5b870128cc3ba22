"""Fusion of transported weights into the target: W = W_T + Mask (alpha W^ + beta W_T); beta = -alpha blends the two."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from tmjax.align.alignment import Alignment
from tmjax.models.spec import ParamSpec, biases, projections, shared_projections
from tmjax.recipes.merge import FusionOptions
from tmjax.transfer.masks import masks
from tmjax.transfer.operators.transport import side, transport_projection
from tmjax.typing import Array, ArrayLike, Params, pytree_dataclass


@pytree_dataclass
@dataclass(frozen=True)
class Transported:
    """What the source contributes to one projection of the target, all layers.

    weight [L, out, in] and bias [L, out] (None where the target has no bias), after norm matching; masks broadcastable
    to them; `raw_norm` [L] is ||W^|| before norm matching; `input_mean` [L, in] is the target's mean input.
    """

    weight: Array
    bias: Array | None
    weight_mask: ArrayLike
    bias_mask: ArrayLike
    raw_norm: Array
    input_mean: ArrayLike


def sharding_of(x: ArrayLike) -> NamedSharding | None:
    """Where an array lies on a mesh; None if it is on no mesh."""
    return x.sharding if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) else None


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim))))


def transport_model(
    alignment: Alignment,
    target_rows: tuple[ParamSpec, ...],
    target: Params,
    source_rows: tuple[ParamSpec, ...],
    source: Params,
    options: FusionOptions,
    *,
    permutations: dict[str, np.ndarray] | None = None,
    base: Params | None = None,
    instead: Callable[[ParamSpec], tuple[Array, Array]] | None = None,
) -> dict[str, Transported]:
    """Transports every projection that the recipe names, by role; raises InputError for a role a model lacks.

    `instead` gives weight and bias of a projection in place of the transported ones (see `regression`).

    With the parameters of a `base` of the target's architecture what is fused is the task vector W^ - W_base.
    """
    rows, rows_source = shared_projections(target_rows, source_rows, options.roles), projections(source_rows)
    bias, bias_source = biases(target_rows), biases(source_rows)
    result = {}
    for role, row in rows.items():
        weight, offset = (
            instead(row)
            if instead is not None
            else transport_projection(
                alignment,
                row,
                source[rows_source[role].path],
                source[bias_source[role].path] if role in bias_source else None,
                kind=options.map,
                permutations=permutations,
                sharding=sharding_of(target[row.path]),
            )
        )
        raw = _norm(weight)
        mean_out = jnp.asarray(side(alignment, row.output_site).mean)
        if options.norm_match:
            scale = jnp.where(raw > 0, _norm(jnp.asarray(target[row.path])) / jnp.where(raw > 0, raw, 1.0), 0.0)
            weight = weight * scale[:, None, None]
            # The affine map is scaled about the mean output, which both models' rows share.
            offset = mean_out + scale[:, None] * (offset - mean_out)
        if base is not None:
            weight = weight - jnp.asarray(base[row.path], jnp.float32)
            offset = offset - jnp.asarray(base[bias[role].path], jnp.float32) if role in bias else offset
        weight_mask, bias_mask = masks(alignment, row, options.mask_top_k)
        keeps = role in bias and options.bias != "none"
        result[role] = Transported(
            weight,
            offset if keeps else None,
            weight_mask,
            bias_mask,
            raw,
            np.asarray(alignment.target[row.input_site].mean),
        )
    return result


def without_source(transported: Mapping[str, Transported]) -> dict[str, Transported]:
    """The same with the source's contribution set to zero: what the control `shrink` fuses."""
    return {
        role: replace(item, weight=item.weight * 0, bias=None if item.bias is None else item.bias * 0)
        for role, item in transported.items()
    }


def of_bias(value: Array) -> Array:
    """A coefficient of a weight, a scalar or [L, out or 1, in or 1], as one of its bias [L, out or 1]."""
    return value if jnp.ndim(value) == 0 else jnp.mean(value, axis=2)


@functools.partial(jax.jit, static_argnames="trust")
def _fuse_weight(old: Array, item: Transported, alpha: Array, beta: Array, trust: float | None) -> tuple[Array, Array]:
    """W, and the factor [L] that the trust cap put on the change."""
    wide = old.astype(jnp.float32)
    change = item.weight_mask * (alpha * item.weight + beta * wide)
    factor = jnp.ones((wide.shape[0],))
    if trust is not None:
        # Squares, with a root only where the cap holds: its derivative at 0 is infinite.
        size, limit = jnp.sum(jnp.square(change), axis=(1, 2)), trust**2 * jnp.sum(jnp.square(wide), axis=(1, 2))
        over = size > limit
        factor = jnp.where(over, jnp.sqrt(limit / jnp.where(over, size, 1.0)), 1.0)
    return wide + factor[:, None, None] * change, factor


@jax.jit
def _fuse_bias(old: Array, item: Transported, alpha: Array, beta: Array, factor: Array) -> Array:
    wide = old.astype(jnp.float32)
    return wide + factor[:, None] * item.bias_mask * (of_bias(alpha) * item.bias + of_bias(beta) * wide)


@jax.jit
def _keep_mean(old: Array, old_weight: Array, new_weight: Array, mean: Array) -> Array:
    moved = jnp.einsum(
        "loi,li->lo", old_weight.astype(jnp.float32) - new_weight, mean, precision=jax.lax.Precision.HIGHEST
    )
    return old.astype(jnp.float32) + moved


#: alpha and beta of each role: numbers, or arrays that broadcast to the stacked weight (see `fuse.learned`).
Coefficients = Mapping[str, tuple[ArrayLike | float, ArrayLike | float]]


def fuse_params(
    target_rows: tuple[ParamSpec, ...],
    target: Params,
    transported: Mapping[str, Transported],
    coefficients: Coefficients,
    *,
    bias_rule: str = "transported",
    trust: float | None = None,
) -> dict[str, ArrayLike]:
    """The target's parameters with every transported projection fused in (float32), the rest as they are.

    `bias_rule`: `transported` treats a bias like its weight; `keep_mean` sets b = b_T + (W_T - W) mu_in, which keeps
    the mean output; `none` leaves biases alone. `trust`: no layer's weight changes by more than this part of its norm;
    what the cap takes off the weight it takes off the bias.
    """
    rows, bias = projections(target_rows), biases(target_rows)
    fused = dict(target)
    for role, item in transported.items():
        alpha, beta = (jnp.asarray(value, jnp.float32) for value in coefficients[role])
        path = rows[role].path
        fused[path], factor = _fuse_weight(target[path], item, alpha, beta, trust)
        if item.bias is None or role not in bias:
            continue
        where = bias[role].path
        if bias_rule == "keep_mean":
            fused[where] = _keep_mean(target[where], target[path], fused[path], item.input_mean)
        else:
            fused[where] = _fuse_bias(target[where], item, alpha, beta, factor)
    return fused
