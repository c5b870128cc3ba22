"""Neuron plans Q of one site for all (target layer, source layer) pairs, kept as potentials."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.ot import Problem, Solver, correlation, solve, standardise
from tmjax.ot.result import coupling
from tmjax.typing import Array, ArrayLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SitePlans:
    """Plans of a site: potentials and what rebuilds the cost, never the couplings themselves.

    f [L, M, n], g [L, M, k]; epsilon []; the cost 1 - correlation is kept dense in `costs` [L, M, n, k] where that is
    the smaller thing to keep, else rebuilt from standardised features [L, N, n] and [M, N, k]. `gain_target` [L, M,
    n] and `gain_source` [L, M, k] are least-squares gains of the maps in either direction (`map_gains`). Certificates
    [L, M]: layer_cost = <cost, Q>, iterations, converged, marginal error (L1, larger side).
    """

    f: ArrayLike
    g: ArrayLike
    epsilon: ArrayLike
    gain_target: ArrayLike
    gain_source: ArrayLike
    layer_cost: ArrayLike
    iterations: ArrayLike
    converged: ArrayLike
    marginal_error: ArrayLike
    costs: ArrayLike | None = None
    features: tuple[ArrayLike, ArrayLike] | None = None

    @property
    def dense(self) -> bool:
        """Whether the dense costs are kept, because they are smaller than the features."""
        return self.costs is not None

    def plan(self, layer: Array | int, source_layer: Array | int) -> Array:
        """The coupling Q [n, k] of one pair of layers; indices may be traced."""
        if self.costs is not None:
            cost = jnp.asarray(self.costs)[layer, source_layer]
        else:
            zx, zy = (jnp.asarray(z) for z in self.features)
            cost = 1.0 - correlation(zx[layer], zy[source_layer])
        f, g = (jnp.asarray(potential)[layer, source_layer] for potential in (self.f, self.g))
        return coupling(f, g, cost, self.epsilon)


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
def _gains(zx: Array, zy: Array, pairs: Array, f: Array, g: Array, epsilon: Array) -> tuple[Array, Array]:
    def one(item: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        pair, f, g = item
        x, y = zx[pair[0]], zy[pair[1]]
        return map_gains(x, y, coupling(f, g, 1.0 - correlation(x, y), epsilon))

    return jax.lax.map(one, (pairs, f, g))


def solve_site(
    x_lnu: np.ndarray, y_mnu: np.ndarray, solver: Solver, *, centred: bool = True, memory_mib: int = 512
) -> SitePlans:
    """Solves all L x M problems of one site from activations [L, N, n] of the target and [M, N, k] of the source.

    Pairs go to the solver in equal chunks whose costs fit into `memory_mib`; marginals are uniform. `solver.epsilon`
    must exist: plans are kept as entropic potentials.
    """
    zx, zy = (standardise(jnp.asarray(x), centre=centred) for x in (x_lnu, y_mnu))
    layers, sources = zx.shape[0], zy.shape[0]
    n, k, rows = zx.shape[2], zy.shape[2], zx.shape[1]
    pairs = np.stack(np.meshgrid(np.arange(layers), np.arange(sources), indexing="ij"), -1).reshape(-1, 2)
    size = max(1, min(len(pairs), memory_mib * 2**20 // (4 * n * k)))
    padded = np.concatenate([pairs, np.repeat(pairs[-1:], -len(pairs) % size, axis=0)])
    fields = []
    for start in range(0, len(padded), size):
        chunk = jnp.asarray(padded[start : start + size])
        result = solve(Problem.with_uniform_marginals(_costs(zx, zy, chunk)), solver)
        gains = _gains(zx, zy, chunk, result.f, result.g, jnp.float32(solver.epsilon))
        fields.append(
            (
                result.f,
                result.g,
                *gains,
                result.transport_cost,
                result.iterations,
                result.converged,
                result.marginal_error,
            )
        )
    values = (np.concatenate(jax.device_get(column))[: len(pairs)] for column in zip(*fields, strict=True))
    f, g, gain_target, gain_source, *certificates = (v.reshape(layers, sources, *v.shape[1:]) for v in values)
    kept: dict[str, object] = {}
    if layers * sources * n * k <= rows * (layers * n + sources * k):
        kept["costs"] = np.asarray(_costs(zx, zy, jnp.asarray(pairs))).reshape(layers, sources, n, k)
    else:
        kept["features"] = (np.asarray(zx), np.asarray(zy))
    return SitePlans(f, g, np.float32(solver.epsilon), gain_target, gain_source, *certificates, **kept)
