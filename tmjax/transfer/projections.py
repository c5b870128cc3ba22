"""Fusion of transported projections into the target: W = W_T + Mask (alpha W^ + beta W_T).

beta = -alpha blends the two.

Operators that make a W^ for every projection (`transport`, `regression`) share this file: their common options, the
masks, and the coefficients' place in the formula.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from pydantic import Field

from tmjax.align.alignment import Alignment
from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.models.spec import DecoderSpec, ParamSpec, biases, projections, shared_projections
from tmjax.recipes.base import Positive, PositiveFloat, Role, Section
from tmjax.sharding.hosts import to_host
from tmjax.transfer.contribution import Coefficients, Context, Contribution, Shape
from tmjax.transfer.maps import side
from tmjax.transfer.masks import masks
from tmjax.transfer.update_table import COLUMNS, Table, of_layer
from tmjax.typing import Array, ArrayLike, Params, pytree_dataclass


class ProjectionOptions(Section):
    """Options of every operator that fuses projections."""

    roles: Annotated[
        tuple[Role, ...] | None,
        Field(min_length=1, description="Projections to be fused; all that both models have unless given."),
    ] = None
    mask_top_k: Annotated[
        Positive | None, Field(description="Only so many target units per layer, the most active ones, may change.")
    ] = None
    norm_match: Annotated[
        bool, Field(description="Whether each fused tensor is first rescaled to the norm of its target's.")
    ] = True
    bias: Annotated[
        Literal["transported", "keep_mean", "none"],
        Field(description="Biases are fused like weights, keep the mean output, or stay."),
    ] = "transported"
    trust: Annotated[
        PositiveFloat | None, Field(description="Largest change of a layer's weight, as a part of its norm.")
    ] = None
    base: Annotated[
        str | None,
        Field(description="Checkpoint of the target's architecture: task vectors W^ - W_base are fused."),
    ] = None


@pytree_dataclass
@dataclass(frozen=True)
class Transported:
    """The contribution of the source to one projection of the target, all layers.

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
    """Returns the sharding of an array; None if it is on no mesh."""
    return x.sharding if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) else None


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim))))


def transport_projections(
    alignment: Alignment,
    param_specs: tuple[ParamSpec, ...],
    target: Params,
    source_specs: tuple[ParamSpec, ...],
    options: ProjectionOptions,
    make: Callable[[ParamSpec], tuple[Array, Array]],
    base: Params | None = None,
) -> dict[str, Transported]:
    """Makes W^ and b^ of every projection that the options name, matches norms and attaches masks.

    Args:
        alignment: Alignment of the two models.
        param_specs: The target's table of tensors.
        target: The target's parameters.
        source_specs: The source's table of tensors.
        options: Common options of the operator.
        make: From a projection of the target to W^ [L, out, in] and b^ [L, out].
        base: Parameters of a common base of the target's architecture: the task vector W^ - W_base is fused.

    Returns:
        The contributions by role.

    Raises:
        InputError: A role is missing in one of the models.
    """
    bias, result = biases(param_specs), {}
    for role, row in shared_projections(param_specs, source_specs, options.roles).items():
        weight, offset = make(row)
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
        mean_in = np.asarray(alignment.target[row.input_site].mean)
        result[role] = Transported(weight, offset if keeps else None, weight_mask, bias_mask, raw, mean_in)
    return result


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


def fuse_params(
    param_specs: tuple[ParamSpec, ...],
    target: Params,
    transported: Mapping[str, Transported],
    coefficients: Coefficients,
    *,
    bias_rule: str = "transported",
    trust: float | None = None,
) -> dict[str, ArrayLike]:
    """Fuses every transported projection into the target's parameters.

    Args:
        param_specs: The target's table of tensors.
        target: The target's parameters.
        transported: Contributions by role.
        coefficients: alpha and beta by role.
        bias_rule: `transported` treats a bias like its weight; `keep_mean` sets b = b_T + (W_T - W) mu_in, which keeps
            the mean output; `none` leaves biases alone.
        trust: No layer's weight changes by more than this part of its norm; what the cap takes off the weight it takes
            off the bias.

    Returns:
        All parameters; the fused ones in float32, the rest as they are.
    """
    rows, bias = projections(param_specs), biases(param_specs)
    fused = dict(target)
    for role, item in transported.items():
        alpha, beta = (jnp.asarray(value, jnp.float32) for value in coefficients[role])
        path = rows[role].path
        fused[path], factor = _fuse_weight(target[path], item, alpha, beta, trust)
        if item.bias is None or role not in bias:
            continue
        bias_path = bias[role].path
        if bias_rule == "keep_mean":
            fused[bias_path] = _keep_mean(target[bias_path], target[path], fused[path], item.input_mean)
        else:
            fused[bias_path] = _fuse_bias(target[bias_path], item, alpha, beta, factor)
    return fused


@dataclass(frozen=True)
class FuseProjections:
    """Rule by which transported projections enter parameters; see `operator.Rule`."""

    spec: DecoderSpec
    param_specs: tuple[ParamSpec, ...]
    bias_rule: str
    trust: float | None

    def __call__(
        self, params: Params, items: Mapping[str, Transported], coefficients: Coefficients
    ) -> dict[str, ArrayLike]:
        """Returns the parameters with the items fused in."""
        return fuse_params(self.param_specs, params, items, coefficients, bias_rule=self.bias_rule, trust=self.trust)

    def scaled(self, items: Mapping[str, Transported], factor: float) -> dict[str, Transported]:
        """Returns the items with the source's contribution multiplied by a factor."""
        return {
            role: replace(item, weight=item.weight * factor, bias=None if item.bias is None else item.bias * factor)
            for role, item in items.items()
        }

    def rows(
        self, target: Params, fused: Params, items: Mapping[str, Transported], coefficients: Coefficients
    ) -> Table:
        """Returns the rows of the update table of what was fused."""
        return projection_rows(self.spec, self.param_specs, target, fused, items, coefficients)


def projection_contribution(
    target: Model, options: ProjectionOptions, items: Mapping[str, Transported]
) -> Contribution:
    """Returns fused projections as a contribution with the options' rule."""
    rule = FuseProjections(target.spec, target.rows, options.bias, options.trust)
    return Contribution(items, rule, {role: target.projections[role] for role in items})


def with_masks(contribution: Contribution, alignment: Alignment, top_k: int | None) -> Contribution:
    """Returns fused projections with masks of the `top_k` most active target units."""
    rows = contribution.projections
    pairs = {role: masks(alignment, rows[role], top_k) for role in contribution.items}
    items = {
        role: replace(item, weight_mask=pairs[role][0], bias_mask=pairs[role][1])
        for role, item in contribution.items.items()
    }
    return replace(contribution, items=items)


def base_params(options: ProjectionOptions, context: Context) -> Params | None:
    """Loads the common base that options name; raises InputError if it is not of the target's architecture."""
    if options.base is None:
        return None
    assert context.load_model is not None
    base = context.load_model(options.base)
    if base.spec != context.target.spec:
        raise InputError(f"base {options.base} is not of the target's architecture")
    return base.params


def projections_memory(target: Shape, source: Shape, options: ProjectionOptions) -> int:
    """Estimates the bytes of transported weights of all layers, in float32."""
    shared = shared_projections(target.param_specs, source.param_specs, options.roles)
    return sum(4 * math.prod(row.stacked_shape(target.spec)) for row in shared.values())


@jax.jit
def _tensor_norms(old: Array, new: Array, item: Transported, alpha: Array) -> dict[str, Array]:
    def norm(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2)))

    old, new = old.astype(jnp.float32), new.astype(jnp.float32)
    shift = jnp.einsum("loi,li->lo", new - old, item.input_mean, precision=jax.lax.Precision.HIGHEST)
    return {
        "old": norm(old),
        "transported": norm(item.weight),
        "raw": item.raw_norm,
        "part": norm(alpha * item.weight_mask * item.weight),
        "update": norm(new - old),
        "inner": jnp.sum(old * item.weight, axis=(1, 2)),
        "shift": jnp.sqrt(jnp.sum(shift * shift, axis=1)),
        "output": jnp.sqrt(jnp.sum(jnp.square(jnp.einsum("loi,li->lo", old, item.input_mean)), axis=1)),
    }


def projection_rows(
    spec: DecoderSpec,
    param_specs: tuple[ParamSpec, ...],
    target: Params,
    fused: Params,
    transported: Mapping[str, Transported],
    coefficients: Coefficients,
) -> Table:
    """Computes the rows of the update table of fused projections, under their Hugging Face names.

    The columns are those of `update_table.COLUMNS`, alpha and beta (means over heads or units, where they have any).
    """
    table = {}
    for role, item in transported.items():
        row = projections(param_specs)[role]
        alpha, beta = coefficients[role]
        norms = to_host(_tensor_norms(target[row.path], fused[row.path], item, jnp.asarray(alpha, jnp.float32)))
        n = {key: value.astype(np.float64) for key, value in norms.items()}  # 1e-30 squared is no float32
        old, transport = np.maximum(n["old"], 1e-30), np.maximum(n["transported"], 1e-30)
        values = (
            n["transported"] / old,
            n["raw"] / old,
            n["update"] / old,
            n["inner"] / (old * transport),
            n["part"] / old,
            n["shift"] / np.maximum(n["output"], 1e-30) if item.bias is None else n["shift"] * 0,
        )
        columns = dict(zip(COLUMNS, values, strict=True))
        for layer, name in enumerate(row.names(spec)):
            cells = {key: float(column[layer]) for key, column in columns.items()}
            table[name] = cells | {"alpha": of_layer(alpha, layer), "beta": of_layer(beta, layer)}
    return table
