"""Transport of one projection: source weights seen through the plans, for every target layer at once.

`paper` (METHOD section 1.5): W^_l = sum_m P_eff[l, m] Q_out W_m Q_in^T, b^_l = sum_m P_eff[l, m] Q_out b_m.
`barycentric` (DESIGN section 4): W^_l = sum_m p_lm M_out W_m N_in with M = diag(s) diag(1/a) Q diag(1/s') from source
to target and N = diag(s') diag(1/b) Q^T diag(1/s) back, and b^_l = sum_m p_lm (mu_out + M_out (b_m - mu'_out + W_m
(mu'_in - N_in mu_in))).
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.align.alignment import Alignment, plan_site
from tmjax.align.plans import SitePlans
from tmjax.models.spec import ParamSpec
from tmjax.typing import Array, ArrayLike

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Side:
    """What the transport knows of one side (input or output) of a projection.

    Means and scales [layer, unit] of target and source; `permutation` [L, M, k] of the source units, the identity but
    for the control `permuted_plan`.
    """

    plans: SitePlans
    mean: ArrayLike
    scale: ArrayLike
    source_mean: ArrayLike
    source_scale: ArrayLike
    permutation: ArrayLike | None = None


def side(alignment: Alignment, site: str, permutation: np.ndarray | None = None) -> Side:
    """The side of a projection that lies at `site`."""
    target, source, centred = alignment.target[site], alignment.source[site], alignment.centred
    return Side(
        alignment.plans[plan_site(site)],
        target.centre(centred),
        target.scale(centred),
        source.centre(centred),
        source.scale(centred),
        permutation,
    )


def keep_top(q: Array, top_k: int | None) -> Array:
    """Keeps an entry of a plan if it is among the `top_k` largest of its row or of its column (paper, appendix A.1)."""
    if top_k is None:
        return q

    def threshold(x: Array) -> Array:
        return jax.lax.top_k(x, min(top_k, x.shape[-1]))[0][:, -1]

    mass = jnp.abs(q)  # signed plans carry their mass in either sign
    return jnp.where((mass >= threshold(mass)[:, None]) | (mass >= threshold(mass.T)[None, :]), q, 0.0)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, 0 for dead units."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1.0), 0.0)


def to_target(end: Side, layer: Array, source: Array, *, gain: bool, top_k: int | None = None) -> Array:
    """M [n, k] = diag(s) diag(1/a) Q diag(1/s'), rows times the gain if asked."""
    q = keep_top(end.plans.plan(layer, source), top_k)
    rows = jnp.asarray(end.scale)[layer] * q.shape[0]
    if gain:
        rows = rows * jnp.asarray(end.plans.gain_target)[layer, source]
    return rows[:, None] * q * _ratio(jnp.float32(1), jnp.asarray(end.source_scale)[source])[None, :]


def to_source(end: Side, layer: Array, source: Array, *, gain: bool, top_k: int | None = None) -> Array:
    """N [k, n] = diag(s') diag(1/b) Q^T diag(1/s), rows times the gain if asked."""
    q = keep_top(end.plans.plan(layer, source), top_k)
    rows = jnp.asarray(end.source_scale)[source] * q.shape[1]
    if gain:
        rows = rows * jnp.asarray(end.plans.gain_source)[layer, source]
    return rows[:, None] * q.T * _ratio(jnp.float32(1), jnp.asarray(end.scale)[layer])[None, :]


def _permuted(x: Array, end: Side, layer: Array, source: Array, axis: int) -> Array:
    if end.permutation is None:
        return x
    return jnp.take(x, jnp.asarray(end.permutation)[layer, source], axis=axis)


@functools.partial(jax.jit, static_argnames=("kind", "gain", "top_k"))
def transport(
    into: Side, out: Side, weights_lm: Array, w_moi: Array, b_mo: Array, *, kind: str, gain: bool, top_k: int | None
) -> tuple[Array, Array]:
    """W^ [L, out, in] and b^ [L, out] float32 from source weights [M, out', in'] and biases [M, out'] (zero if none).

    `weights_lm` are the layer weights: P_eff for `paper`, its normalised rows for `barycentric`.
    """

    def pair(layer: Array, source: Array) -> tuple[Array, Array]:
        w = _permuted(w_moi[source].astype(jnp.float32), out, layer, source, 0)
        w = _permuted(w, into, layer, source, 1)
        b = _permuted(b_mo[source].astype(jnp.float32), out, layer, source, 0)
        if kind == "paper":
            q_out = keep_top(out.plans.plan(layer, source), top_k)
            q_in = keep_top(into.plans.plan(layer, source), top_k)
            return _dot(_dot(q_out, w), q_in.T), _dot(q_out, b)
        m_out = to_target(out, layer, source, gain=gain, top_k=top_k)
        n_in = to_source(into, layer, source, gain=gain, top_k=top_k)
        source_in = _permuted(jnp.asarray(into.source_mean)[source], into, layer, source, 0)
        source_out = _permuted(jnp.asarray(out.source_mean)[source], out, layer, source, 0)
        inner = b - source_out + _dot(w, source_in - _dot(n_in, jnp.asarray(into.mean)[layer]))
        return _dot(_dot(m_out, w), n_in), jnp.asarray(out.mean)[layer] + _dot(m_out, inner)

    def target_layer(layer: Array) -> tuple[Array, Array]:
        def add(total: tuple[Array, Array], source: Array) -> tuple[tuple[Array, Array], None]:
            share = weights_lm[layer, source]
            return jax.tree.map(lambda t, x: t + share * x, total, pair(layer, source)), None

        n_out, n_in = jnp.asarray(out.mean).shape[1], jnp.asarray(into.mean).shape[1]
        zero = (jnp.zeros((n_out, n_in), jnp.float32), jnp.zeros((n_out,), jnp.float32))
        return jax.lax.scan(add, zero, jnp.arange(w_moi.shape[0]))[0]

    return jax.lax.map(target_layer, jnp.arange(weights_lm.shape[0]))


def transport_projection(
    alignment: Alignment,
    row: ParamSpec,
    weight: ArrayLike,
    bias: ArrayLike | None,
    *,
    kind: str,
    gain: bool = False,
    top_k: int | None = None,
    permutations: dict[str, np.ndarray] | None = None,
) -> tuple[Array, Array]:
    """Transports one projection of the source (stacked weight and bias) for all target layers; see the module."""
    permutations = permutations or {}
    into, out = (side(alignment, site, permutations.get(plan_site(site))) for site in (row.input_site, row.output_site))
    plan = alignment.layer_plans[row.role]
    weights = jnp.asarray(plan.effective if kind == "paper" else plan.weights)
    zero = jnp.zeros(weight.shape[:2], jnp.float32)
    return transport(
        into,
        out,
        weights,
        jnp.asarray(weight),
        zero if bias is None else jnp.asarray(bias),
        kind=kind,
        gain=gain,
        top_k=top_k,
    )
