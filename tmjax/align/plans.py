"""Neuron plans Q of one site for all (target layer, source layer) pairs."""

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.errors import InputError
from tmjax.ot import (
    EntropicPlan,
    LowRankPlan,
    MatchPlan,
    Plan,
    Problem,
    SignedPlan,
    Solver,
    capabilities_of,
    correlation,
    solve,
    standardise,
)
from tmjax.typing import Array, ArrayLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FeaturePlan:
    """Entropic plans of all pairs of layers whose cost is rebuilt when asked for.

    Potentials f [L, M, n], g [L, M, k], epsilon [L, M]; standardised activations zx [L, N, n] and zy [M, N, k].
    """

    form: ClassVar[type[EntropicPlan]] = EntropicPlan

    f: ArrayLike
    g: ArrayLike
    epsilon: ArrayLike
    zx: ArrayLike
    zy: ArrayLike

    def pair(self, layer: Array | int, source_layer: Array | int) -> EntropicPlan:
        """The plan of one pair of layers."""
        f, g, epsilon = (jnp.asarray(x)[layer, source_layer] for x in (self.f, self.g, self.epsilon))
        rho = correlation(jnp.asarray(self.zx)[layer], jnp.asarray(self.zy)[source_layer])
        return self.form(f, g, epsilon, 1.0 - rho)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SignedFeaturePlan(FeaturePlan):
    """The same of signed plans: the features give the costs and the signs."""

    form: ClassVar[type[EntropicPlan]] = SignedPlan


_REBUILT: dict[type[EntropicPlan], type[FeaturePlan]] = {cls.form: cls for cls in (FeaturePlan, SignedFeaturePlan)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SitePlans:
    """Plans of a site for all pairs of layers, in the smallest form that `fuse` can rebuild the couplings from.

    `held`: plans with leading axes [L, M]; where that is smaller, entropic ones without their costs (`FeaturePlan`).
    `gain_target` [L, M, n] and `gain_source` [L, M, k] are least-squares gains of the maps in either direction
    (`map_gains`). Certificates [L, M]: layer_cost = <cost, Q>, iterations, converged, marginal error (L1, larger side).
    """

    held: Plan | FeaturePlan
    gain_target: ArrayLike
    gain_source: ArrayLike
    layer_cost: ArrayLike
    iterations: ArrayLike
    converged: ArrayLike
    marginal_error: ArrayLike

    @property
    def stored(self) -> str:
        """What is kept: potentials with features, potentials with dense costs, or the plan's own form."""
        names = {
            FeaturePlan: "potentials, features",
            EntropicPlan: "potentials, costs",
            LowRankPlan: "factors",
            MatchPlan: "matches",
        }
        return next((name for form, name in names.items() if isinstance(self.held, form)), "dense")

    def plan(self, layer: Array | int, source_layer: Array | int) -> Array:
        """The coupling Q [n, k] of one pair of layers; indices may be traced."""
        if isinstance(self.held, FeaturePlan):
            return self.held.pair(layer, source_layer).matrix()
        return jax.tree.map(lambda x: jnp.asarray(x)[layer, source_layer], self.held).matrix()


@jax.jit
def _costs(zx: Array, zy: Array, pairs: Array) -> Array:
    return jax.lax.map(lambda pair: 1.0 - correlation(zx[pair[0]], zy[pair[1]]), pairs)


@jax.jit
def map_gains(zx_nt: Array, zy_nk: Array, q_tk: Array) -> tuple[Array, Array]:
    """Least-squares gains of the barycentric maps of a coupling, per target and per source unit.

    A barycentric map averages, so what it predicts varies too little. With x^ = diag(1/a) Q y on standardised rows, the
    gain Cov(x, x^) / Var(x^) is the factor per unit that makes it the best predictor; likewise back. Never negative.
    """

    def gain(z: Array, predicted: Array) -> Array:
        variance = jnp.sum(predicted * predicted, axis=0)
        covariance = jnp.sum(z * predicted, axis=0)
        return jnp.where(
            variance > 1e-12, jnp.maximum(covariance, 0.0) / jnp.where(variance > 1e-12, variance, 1.0), 0.0
        )

    highest = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    n, k = q_tk.shape
    return gain(zx_nt, highest(zy_nk, q_tk.T) * n), gain(zy_nk, highest(zx_nt, q_tk) * k)


@jax.jit
def _gains(zx: Array, zy: Array, pairs: Array, plans: Plan) -> tuple[Array, Array]:
    def one(item: tuple[Array, Plan]) -> tuple[Array, Array]:
        pair, plan = item
        return map_gains(zx[pair[0]], zy[pair[1]], plan.matrix())

    return jax.lax.map(one, (pairs, plans))


def solve_site(
    x_lnu: np.ndarray, y_mnu: np.ndarray, solver: Solver, *, centred: bool = True, memory_mib: int = 512
) -> SitePlans:
    """Solves all L x M problems of one site from activations [L, N, n] of the target and [M, N, k] of the source.

    Pairs go to the solver in equal chunks whose costs, and features where the solver compares units within a side, fit
    into `memory_mib`; marginals are uniform. Raises InputError for solvers that find maps, not couplings.
    """
    can = capabilities_of(solver)
    if can.map_only:
        raise InputError(f"solver {solver.name!r} finds a linear map, not a coupling; alignments are made of couplings")
    zx, zy = (standardise(jnp.asarray(x), centre=centred) for x in (x_lnu, y_mnu))
    layers, sources = zx.shape[0], zy.shape[0]
    n, k, rows = zx.shape[2], zy.shape[2], zx.shape[1]
    # Costs are kept with the potentials where that takes less room than the activations that they come from.
    keep_costs = layers * sources * n * k <= rows * (layers * n + sources * k)
    pairs = np.stack(np.meshgrid(np.arange(layers), np.arange(sources), indexing="ij"), -1).reshape(-1, 2)
    per_pair = n * k + (rows * (n + k) + n * n + k * k if can.needs_features else 0)
    size = max(1, min(len(pairs), memory_mib * 2**20 // (4 * per_pair)))
    padded = np.concatenate([pairs, np.repeat(pairs[-1:], -len(pairs) % size, axis=0)])
    parts = []
    for start in range(0, len(padded), size):
        chunk = jnp.asarray(padded[start : start + size])
        features = (zx[chunk[:, 0]], zy[chunk[:, 1]]) if can.needs_features else None
        result = solve(Problem.with_uniform_marginals(_costs(zx, zy, chunk), features), solver)
        gains = _gains(zx, zy, chunk, result.plan)
        plan = result.plan
        if isinstance(plan, EntropicPlan) and not keep_costs:
            plan = replace(plan, cost=None)
        certificates = (result.transport_cost, result.iterations, result.converged, result.marginal_error)
        parts.append(jax.device_get((plan, *gains, *certificates)))
    joined = jax.tree.map(lambda *x: np.concatenate(x)[: len(pairs)].reshape(layers, sources, *x[0].shape[1:]), *parts)
    held = joined[0]
    if isinstance(held, EntropicPlan) and held.cost is None:
        held = _REBUILT[type(held)](held.f, held.g, held.epsilon, np.asarray(zx), np.asarray(zy))
    return SitePlans(held, *joined[1:])
