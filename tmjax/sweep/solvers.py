"""Comparison of solvers on the same real problems: time, certificate, cost, what the maps explain of held-out rows."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.activations.store import Activations
from tmjax.align.plans import SitePlans, solve_site
from tmjax.ot import Solver
from tmjax.typing import Array


@dataclass(frozen=True)
class SolverRow:
    """One solver on all pairs of layers of one site.

    `seconds`: all pairs, compiled, costs included; `first_seconds`: the first call, compilation included. Iterations,
    L1 marginal errors and transport costs over the pairs. `explained_target`, `explained_source`: share of the variance
    of held-out standardised activations that the barycentric maps source -> target and back explain, mean over units
    and pairs of layers; `..._gain`: with the least-squares gain of every unit fitted on the other half of the rows.
    """

    solver: str
    site: str
    problems: int
    seconds: float
    first_seconds: float
    iterations_mean: float
    iterations_max: int
    converged: int
    marginal_error: float
    transport_cost: float
    explained_target: float
    explained_source: float
    explained_target_gain: float
    explained_source_gain: float


def split_rows(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of every other document, and of the rest: no document is in both halves."""
    odd = documents % 2 == 1
    return np.nonzero(~odd)[0], np.nonzero(odd)[0]


@jax.jit
def _explained(plans: SitePlans, zx_lnu: Array, zy_mnu: Array) -> tuple[Array, Array, Array, Array]:
    """Explained variance of held-out rows, [L, M] each: to target, to source, and both with gains."""

    def share(z: Array, predicted: Array) -> Array:
        total = jnp.sum(z * z, axis=0)
        left = jnp.sum(jnp.square(z - predicted), axis=0)
        return jnp.mean(jnp.where(total > 0, 1.0 - left / jnp.where(total > 0, total, 1.0), 0.0))

    def pair(index: Array) -> tuple[Array, Array, Array, Array]:
        layer, source = index[0], index[1]
        q = plans.plan(layer, source)
        x, y = zx_lnu[layer], zy_mnu[source]
        to_x = jnp.matmul(y, q.T, precision=jax.lax.Precision.HIGHEST) * q.shape[0]
        to_y = jnp.matmul(x, q, precision=jax.lax.Precision.HIGHEST) * q.shape[1]
        gain_x, gain_y = (jnp.asarray(g)[layer, source] for g in (plans.gain_target, plans.gain_source))
        return share(x, to_x), share(y, to_y), share(x, to_x * gain_x), share(y, to_y * gain_y)

    layers, sources = zx_lnu.shape[0], zy_mnu.shape[0]
    grid = jnp.stack(jnp.meshgrid(jnp.arange(layers), jnp.arange(sources), indexing="ij"), -1).reshape(-1, 2)
    return jax.lax.map(pair, grid)


def held_out(fitted: np.ndarray, other: np.ndarray, *, centred: bool = True) -> np.ndarray:
    """`other` [S, N, unit] standardised by what `fitted` has for mean and standard deviation; constant units become 0.

    Not `centred`: divided by the root mean square alone.
    """
    mean = fitted.mean(axis=1, keepdims=True) if centred else 0.0
    std = np.sqrt(np.mean(np.square(fitted - mean), axis=1, keepdims=True))
    return np.where(std > 0, (other - mean) / np.where(std > 0, std, 1), 0).astype(np.float32)


def measure_site(
    name: str,
    solver: Solver,
    site: str,
    target: Activations,
    source: Activations,
    *,
    centred: bool = True,
    memory_mib: int = 512,
    repeats: int = 3,
) -> SolverRow:
    """Solves every pair of layers of a site on one half of the rows and measures the maps on the other.

    The time is the median of `repeats` calls after a first one that compiles.
    """
    fit_rows, test_rows = split_rows(target.rows.document)
    x, y = target.site(site), source.site(site)
    x_fit, y_fit = (np.ascontiguousarray(z[:, fit_rows]) for z in (x, y))
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        plans = solve_site(x_fit, y_fit, solver, centred=centred, memory_mib=memory_mib)
        times.append(time.perf_counter() - started)
    x_test, y_test = (held_out(a, b[:, test_rows], centred=centred) for a, b in ((x_fit, x), (y_fit, y)))
    explained = _explained(plans, x_test, y_test)
    to_target, to_source, to_target_gain, to_source_gain = (float(np.mean(value)) for value in explained)
    return SolverRow(
        solver=name,
        site=site,
        problems=int(plans.converged.size),
        seconds=float(np.median(times[1:])),
        first_seconds=times[0],
        iterations_mean=float(plans.iterations.mean()),
        iterations_max=int(plans.iterations.max()),
        converged=int(plans.converged.sum()),
        marginal_error=float(plans.marginal_error.max()),
        transport_cost=float(plans.layer_cost.mean()),
        explained_target=to_target,
        explained_source=to_source,
        explained_target_gain=to_target_gain,
        explained_source_gain=to_source_gain,
    )


def summarise(rows: list[SolverRow], merges: Mapping[str, float]) -> list[dict[str, object]]:
    """One line per solver over all sites: sums of seconds and problems, means of shares, the merge's bits per byte."""
    lines = []
    for name in dict.fromkeys(row.solver for row in rows):
        own = [row for row in rows if row.solver == name]
        lines.append(
            {
                "solver": name,
                "seconds": sum(row.seconds for row in own),
                "first_seconds": sum(row.first_seconds for row in own),
                "problems": sum(row.problems for row in own),
                "converged": sum(row.converged for row in own),
                "iterations_mean": float(np.mean([row.iterations_mean for row in own])),
                "iterations_max": max(row.iterations_max for row in own),
                "marginal_error": max(row.marginal_error for row in own),
                "transport_cost": float(np.mean([row.transport_cost for row in own])),
                **{
                    key: float(np.mean([getattr(row, key) for row in own]))
                    for key in (
                        "explained_target",
                        "explained_source",
                        "explained_target_gain",
                        "explained_source_gain",
                    )
                },
                "bits_per_byte": merges.get(name),
            }
        )
    return lines
