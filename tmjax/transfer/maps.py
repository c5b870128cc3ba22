"""Maps between units of two models at one site, through its plans, scales and means.

`M = diag(s) diag(1/a) Q diag(1/s')` maps from source to target, `N = diag(s') diag(1/b) Q^T diag(1/s)` back (see the
design page, section Math).
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tmjax.align.alignment import Alignment, plan_site
from tmjax.align.site_plans import SitePlans
from tmjax.ot import Plan
from tmjax.typing import Array, ArrayLike, pytree_dataclass

dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@pytree_dataclass
@dataclass(frozen=True)
class Side:
    """One side (input or output) of a projection: plans, means and scales [layer, unit] of target and source.

    `order` [L, M, k] is the order in which the plans' columns take the source's units (None: their own).
    """

    plans: SitePlans
    mean: ArrayLike
    scale: ArrayLike
    source_mean: ArrayLike
    source_scale: ArrayLike
    order: ArrayLike | None = None


def side(alignment: Alignment, site: str) -> Side:
    """Returns the side of a projection that lies at `site`.

    Plans between real units need no scales; and queries and keys keep no means: what the logits see is q and k whole.
    """
    target, source = alignment.target[site], alignment.source[site]
    plans, centred = alignment.plans[plan_site(site)], alignment.centred
    means = [both.centre(centred and not (plans.real_units and site in ("q", "k"))) for both in (target, source)]
    scales = [both.scale(centred) for both in (target, source)]
    if plans.real_units:
        scales = [scale * 0 + 1 for scale in scales]
    return Side(plans, means[0], scales[0], means[1], scales[1], alignment.source_order.get(plan_site(site)))


def _inverse(x: Array) -> Array:
    """1 / x, 0 for dead units."""
    return jnp.where(x > 0, 1.0 / jnp.where(x > 0, x, 1.0), 0.0)


def scaled_plan(end: Side, layer: Array, source: Array) -> tuple[Plan, Array, Array, Array, Array]:
    """The plan of a pair of layers; what M multiplies rows of Q by [n] and its columns [k]; the same of N, Q^T."""
    plan, weight_target, weight_source = end.plans.pair(layer, source)
    s, s_source = jnp.asarray(end.scale)[layer], jnp.asarray(end.source_scale)[source]
    weight_target = s.shape[0] if weight_target is None else weight_target
    weight_source = s_source.shape[0] if weight_source is None else weight_source
    return plan, s * weight_target, _inverse(s_source), s_source * weight_source, _inverse(s)


def reordered(x: Array, end: Side, layer: Array, source: Array, axis: int) -> Array:
    """Takes the source's units along an axis in the order of the plans of a pair of layers."""
    if end.order is None:
        return x
    return jnp.take(x, jnp.asarray(end.order)[layer, source], axis=axis)


def mapped_outputs(end: Side, layer: int, source_layer: int, y_rk: Array) -> Array:
    """M (y - mean) [N, n] for the source's activations y [N, k] of a site: what they mean in the target's units."""
    _, rows, columns, _, _ = scaled_plan(end, layer, source_layer)
    plan = end.plans.pair(layer, source_layer)[0]
    y = reordered(y_rk - jnp.asarray(jnp.mean(y_rk, axis=0)), end, layer, source_layer, 1)
    return (rows[:, None] * plan.apply(columns[:, None] * y.T)).T
