"""Comparison of solvers on the same problems: time, certificate, cost, explained variance of held-out rows."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.activations.store import Activations
from tmjax.align.features import FeatureSite
from tmjax.align.plans import solve_site
from tmjax.align.site_plans import SitePlans
from tmjax.errors import InputError
from tmjax.ot import Solver, make_solver, prepared
from tmjax.typing import Array


@dataclass(frozen=True)
class SolverRow:
    """One solver on all pairs of layers of one site.

    `seconds`: all pairs, compiled, costs included; `first_seconds`: the first call, compilation included. Iterations,
    L1 marginal errors and transport costs over the pairs (None for maps, which have no marginals).
    `explained_target`, `explained_source`: share of the variance of held-out standardised activations that the maps
    source -> target and back explain, mean over units and pairs of layers; `..._gain`: with the least-squares gain of
    every unit fitted on the other half of the rows. `distance_to_exact`: half the L1 distance of |Q| to an optimal plan
    of the same cost (1: no mass in common), mean over the pairs it was computed for; None where it was not.
    """

    solver: str
    site: str
    problems: int
    seconds: float
    first_seconds: float
    iterations_mean: float
    iterations_max: int
    converged: int
    marginal_error: float | None
    transport_cost: float | None
    explained_target: float
    explained_source: float
    explained_target_gain: float
    explained_source_gain: float
    distance_to_exact: float | None
    exact_cost: float | None


def split_rows(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits row numbers into those of every other document and the rest: no document is in both halves."""
    odd = documents % 2 == 1
    return np.nonzero(~odd)[0], np.nonzero(odd)[0]


@jax.jit
def _explained(plain: SitePlans, gained: SitePlans, zx_lnu: Array, zy_mnu: Array) -> tuple[Array, Array, Array, Array]:
    """Computes the explained variance of held-out rows, [L, M] each: to target, to source, and both with gains."""

    def share(z: Array, predicted: Array) -> Array:
        total = jnp.sum(z * z, axis=0)
        left = jnp.sum(jnp.square(z - predicted), axis=0)
        return jnp.mean(jnp.where(total > 0, 1.0 - left / jnp.where(total > 0, total, 1.0), 0.0))

    def pair(index: Array) -> tuple[Array, Array, Array, Array]:
        layer, source = index[0], index[1]
        x, y = zx_lnu[layer], zy_mnu[source]
        plan, *weights = plain.pair(layer, source)
        gains = gained.pair(layer, source)[1:]
        to_x, to_y = plan.apply(y.T).T, plan.apply_transpose(x.T).T
        # Without weights the rows of Q and of Q^T sum to 1 / n and 1 / k.
        rows, columns = (z.shape[1] if w is None else w for z, w in zip((x, y), weights, strict=True))
        return share(x, to_x * rows), share(y, to_y * columns), share(x, to_x * gains[0]), share(y, to_y * gains[1])

    layers, sources = zx_lnu.shape[0], zy_mnu.shape[0]
    grid = jnp.stack(jnp.meshgrid(jnp.arange(layers), jnp.arange(sources), indexing="ij"), -1).reshape(-1, 2)
    return jax.lax.map(pair, grid)


def exact_plans(site: FeatureSite, pairs: np.ndarray) -> dict[tuple[int, int], tuple[np.ndarray, float]]:
    """Computes optimal plans [n, k] and their costs for pairs of layers [P, 2] by the network simplex (float64).

    Empty where POT is not installed.
    """
    solver, optimal = make_solver("network_simplex"), {}
    for layer, source in pairs.tolist():
        problem = prepared(site.problem(layer, source), solver)
        try:
            result = solver.solve_on_host(jax.device_get(problem))
        except InputError:
            return {}
        optimal[layer, source] = np.asarray(result.plan.matrix(), np.float64), float(result.transport_cost)
    return optimal


def distances(plans: SitePlans, exact: Mapping[tuple[int, int], tuple[np.ndarray, float]]) -> float | None:
    """Returns the mean half L1 distance of plans to the optimal ones; None without optimal plans."""
    compared = [(np.asarray(plans.plan(*pair), np.float64), truth) for pair, (truth, _) in exact.items()]
    return float(np.mean([np.abs(np.abs(q) - truth).sum() / 2 for q, truth in compared])) if compared else None


def held_out(fitted: np.ndarray, other: np.ndarray, *, centred: bool = True) -> np.ndarray:
    """Standardises `other` [S, N, unit] by the mean and standard deviation of `fitted`; constant units become 0.

    Without `centred`, `other` is divided by the root mean square alone.
    """
    mean = fitted.mean(axis=1, keepdims=True) if centred else 0.0
    std = np.sqrt(np.mean(np.square(fitted - mean), axis=1, keepdims=True))
    return np.where(std > 0, (other - mean) / np.where(std > 0, std, 1), 0).astype(np.float32)


@dataclass(frozen=True)
class SolverProblem:
    """Activations of one site, in rows to fit on and held-out rows, and its optimal plans where feasible."""

    site: str
    x_fit: np.ndarray
    y_fit: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    centred: bool
    exact: Mapping[tuple[int, int], tuple[np.ndarray, float]]

    @classmethod
    def of(
        cls, site: str, target: Activations, source: Activations, *, centred: bool = True, exact_entries: int = 2**17
    ) -> "SolverProblem":
        """Makes the problem of activations.

        Optimal plans are computed for each target layer and the source layer at its depth if n k is at most
        `exact_entries`: a network simplex takes seconds there, hours beyond.
        """
        fit_rows, test_rows = split_rows(target.rows.document)
        x, y = target.site(site), source.site(site)
        x_fit, y_fit = (np.ascontiguousarray(z[:, fit_rows]) for z in (x, y))
        x_test, y_test = (held_out(a, b[:, test_rows], centred=centred) for a, b in ((x_fit, x), (y_fit, y)))
        depth = np.linspace(0, y.shape[0] - 1, x.shape[0]).round().astype(int)
        pairs = np.stack([np.arange(x.shape[0]), depth], axis=1)
        feasible = x.shape[2] * y.shape[2] <= exact_entries
        exact = exact_plans(FeatureSite.of(x_fit, y_fit, centred=centred), pairs) if feasible else {}
        return cls(site, x_fit, y_fit, x_test, y_test, centred, exact)


def measure_site(
    name: str, solver: Solver, problem: SolverProblem, *, memory_mib: int | None = None, repeats: int = 3
) -> SolverRow:
    """Solves every pair of layers of a site on one half of the rows and measures the maps on the other.

    The time is the median of `repeats` calls after the first one, which compiles.
    """

    def run(*, gain: bool) -> SitePlans:
        return solve_site(
            problem.x_fit, problem.y_fit, solver, centred=problem.centred, memory_mib=memory_mib, gain=gain
        )

    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        plans = run(gain=False)
        times.append(time.perf_counter() - started)
    explained = _explained(plans, run(gain=True), problem.x_test, problem.y_test)
    to_target, to_source, to_target_gain, to_source_gain = (float(np.mean(value)) for value in explained)
    maps = solver.properties.map_only
    return SolverRow(
        solver=name,
        site=problem.site,
        problems=int(plans.converged.size),
        seconds=float(np.median(times[1:])),
        first_seconds=times[0],
        iterations_mean=float(plans.iterations.mean()),
        iterations_max=int(plans.iterations.max()),
        converged=int(plans.converged.sum()),
        marginal_error=None if maps else float(plans.marginal_error.max()),
        transport_cost=None if maps else float(plans.layer_cost.mean()),
        explained_target=to_target,
        explained_source=to_source,
        explained_target_gain=to_target_gain,
        explained_source_gain=to_source_gain,
        distance_to_exact=None if maps else distances(plans, problem.exact),
        exact_cost=float(np.mean([cost for _, cost in problem.exact.values()])) if problem.exact else None,
    )


def summarise(rows: list[SolverRow], merges: Mapping[str, float]) -> list[dict[str, object]]:
    """Summarises each solver over all sites: sums of seconds and problems, means of shares, bits per byte."""
    lines = []
    for name in dict.fromkeys(row.solver for row in rows):
        own = [row for row in rows if row.solver == name]

        def over(key: str, how: Callable[[list[float]], float], own: list[SolverRow] = own) -> float | None:
            values = [getattr(row, key) for row in own if getattr(row, key) is not None]
            return how(values) if values else None

        def mean(values: list[float]) -> float:
            return float(np.mean(values))

        how = dict.fromkeys(("seconds", "first_seconds", "problems", "converged"), sum)
        how |= dict.fromkeys(("iterations_max", "marginal_error"), max)
        own_keys = [field.name for field in fields(SolverRow) if field.name not in ("solver", "site")]
        line = {key: over(key, how.get(key, mean)) for key in own_keys}
        lines.append({"solver": name, **line, "bits_per_byte": merges.get(name)})
    return lines
