"""Transport of weights: the source's projections seen through the plans, for every target layer at once.

`paper` (arXiv:2602.05495): W^_l = sum_m P_eff[l, m] Q_out W_m Q_in^T, b^_l = sum_m P_eff[l, m] Q_out b_m.
`barycentric`: W^_l = sum_m p_lm M_out W_m N_in with M = diag(s) diag(1/a) Q diag(1/s') from source to target and
N = diag(s') diag(1/b) Q^T diag(1/s) back, and b^_l = sum_m p_lm (mu_out + M_out (b_m - mu'_out + W_m (mu'_in - N_in
mu_in))).
"""

import functools
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from pydantic import Field

from tmjax.align.alignment import Alignment
from tmjax.errors import InputError
from tmjax.models.spec import ParamSpec, biases, projections
from tmjax.recipes.base import Section
from tmjax.transfer.contribution import Context, Contribution, Shape
from tmjax.transfer.maps import Side, dot, reordered, scaled_plan, side
from tmjax.transfer.projections import (
    ProjectionOptions,
    Transported,
    base_params,
    projection_contribution,
    projections_memory,
    sharding_of,
    transport_projections,
)
from tmjax.transfer.source_view import SourceView
from tmjax.typing import Array, ArrayLike, Params


class TransportOptions(ProjectionOptions):
    """Options of the operator `transport`."""

    map: Annotated[
        Literal["paper", "barycentric"],
        Field(description="How plans become maps: as the paper prints it, or barycentric with unit scales and means."),
    ] = "barycentric"


@functools.partial(jax.jit, static_argnames=("kind", "sharding"))
def transport(
    into: Side,
    out: Side,
    weights_lm: Array,
    w_moi: Array,
    b_mo: Array,
    *,
    kind: str,
    sharding: NamedSharding | None = None,
) -> tuple[Array, Array]:
    """W^ [L, out, in] and b^ [L, out] float32 from source weights [M, out', in'] and biases [M, out'] (zero if none).

    `weights_lm` are the layer weights: P_eff for `paper`, its normalised rows for `barycentric`; pairs without weight
    are not looked at. Plans are only applied, never written out (see `Plan.apply`). W^ lies where `sharding` says.
    """

    def pair(layer: Array, source: Array) -> tuple[Array, Array]:
        w = reordered(w_moi[source].astype(jnp.float32), out, layer, source, 0)
        w = reordered(w, into, layer, source, 1)
        b = reordered(b_mo[source].astype(jnp.float32), out, layer, source, 0)
        q_out, m_rows, m_columns, _, _ = scaled_plan(out, layer, source)
        q_in, _, _, n_rows, n_columns = scaled_plan(into, layer, source)
        if kind == "paper":
            moved = q_in.apply(w.T).T
            both = q_out.apply(jnp.concatenate([moved, b[:, None]], axis=1))
            return both[:, :-1], both[:, -1]
        # W N = (N^T W^T)^T with N^T = diag(1/s) Q diag(1/b) diag(s').
        moved = (n_columns[:, None] * q_in.reversed().apply(n_rows[:, None] * w.T)).T
        source_in = reordered(jnp.asarray(into.source_mean)[source], into, layer, source, 0)
        source_out = reordered(jnp.asarray(out.source_mean)[source], out, layer, source, 0)
        inner = b - source_out + dot(w, source_in) - dot(moved, jnp.asarray(into.mean)[layer])
        both = m_rows[:, None] * q_out.apply(m_columns[:, None] * jnp.concatenate([moved, inner[:, None]], axis=1))
        return both[:, :-1], jnp.asarray(out.mean)[layer] + both[:, -1]

    def target_layer(layer: Array) -> tuple[Array, Array]:
        def add(total: tuple[Array, Array], source: Array) -> tuple[tuple[Array, Array], None]:
            share = weights_lm[layer, source]

            def moved() -> tuple[Array, Array]:
                return jax.tree.map(lambda t, x: t + share * x, total, pair(layer, source))

            return jax.lax.cond(share > 0, moved, lambda: total), None

        n_out, n_in = jnp.asarray(out.mean).shape[1], jnp.asarray(into.mean).shape[1]
        zero = (jnp.zeros((n_out, n_in), jnp.float32), jnp.zeros((n_out,), jnp.float32))
        return jax.lax.scan(add, zero, jnp.arange(w_moi.shape[0]))[0]

    weight, bias = jax.lax.map(target_layer, jnp.arange(weights_lm.shape[0]))
    return weight if sharding is None else jax.lax.with_sharding_constraint(weight, sharding), bias


def transport_projection(
    alignment: Alignment,
    row: ParamSpec,
    weight: ArrayLike,
    bias: ArrayLike | None,
    *,
    kind: str,
    sharding: NamedSharding | None = None,
) -> tuple[Array, Array]:
    """Transports one projection of the source for all target layers.

    Args:
        alignment: Alignment of the two models.
        row: The target's row of the projection.
        weight: The source's stacked weights [M, out', in'].
        bias: Its stacked biases [M, out'], if it has any.
        kind: `paper` or `barycentric`; see the module.
        sharding: Where W^ lies.

    Returns:
        W^ [L, out, in] and b^ [L, out], float32.

    Raises:
        InputError: `paper` with plans between groups of units.
    """
    if kind == "paper" and any(plans.real_units for plans in alignment.plans.values()):
        raise InputError("transport.map: paper takes plans of single units; set alignment.structure: none")
    into, out = (side(alignment, site) for site in (row.input_site, row.output_site))
    plan = alignment.layer_plans[row.role]
    weights = jnp.asarray(plan.effective if kind == "paper" else plan.weights)
    zero = jnp.zeros(weight.shape[:2], jnp.float32)
    bias = zero if bias is None else jnp.asarray(bias)
    return transport(into, out, weights, jnp.asarray(weight), bias, kind=kind, sharding=sharding)


def transport_model(
    alignment: Alignment,
    param_specs: tuple[ParamSpec, ...],
    target: Params,
    source_specs: tuple[ParamSpec, ...],
    source: Params,
    options: TransportOptions,
    *,
    base: Params | None = None,
) -> dict[str, Transported]:
    """Transports every projection that the options name, by role; raises InputError for a role that a model lacks."""
    weights, offsets = projections(source_specs), biases(source_specs)

    def make(row: ParamSpec) -> tuple[Array, Array]:
        return transport_projection(
            alignment,
            row,
            source[weights[row.role].path],
            source[offsets[row.role].path] if row.role in offsets else None,
            kind=options.map,
            sharding=sharding_of(target[row.path]),
        )

    return transport_projections(alignment, param_specs, target, source_specs, options, make, base)


class Transport:
    """Transported weights of the source, fused with coefficients alpha and beta."""

    name: ClassVar[str] = "transport"
    options: ClassVar[type[Section]] = TransportOptions
    needs: ClassVar[frozenset[str]] = frozenset({"alignment"})
    chooses: ClassVar[bool] = False

    def contribute(
        self, params: Params, source: SourceView, options: TransportOptions, context: Context
    ) -> Contribution:
        """Transports the source's projections; see `operator.Contributor`."""
        target, model = context.target, source.model
        items = transport_model(
            source.alignment(),
            target.rows,
            params,
            model.rows,
            model.params,
            options,
            base=base_params(options, context),
        )
        return projection_contribution(target, options, items)

    def memory(self, target: Shape, source: Shape, options: TransportOptions, batch_tokens: int) -> int:
        """Estimates the bytes of the transported weights."""
        return projections_memory(target, source, options)


OPERATOR = Transport()
