"""Solves for the neuron plans Q of one site, for (target layer, source layer) pairs."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tmjax.align.features import CorrelationSite, FeatureSite, Site
from tmjax.align.site_plans import REBUILT, SitePlans
from tmjax.errors import InputError
from tmjax.ot import (
    DensePlan,
    EntropicPlan,
    FeatureSolver,
    HostSolver,
    MemoryBoundSolver,
    OTResult,
    Plan,
    Problem,
    Solver,
    SparsePlan,
    check_shape,
    prepared,
    solve_each,
)
from tmjax.sharding.hosts import to_host
from tmjax.sharding.memory import solver_mib
from tmjax.typing import Array

#: Most pairs of layers that are solved in one call; progress is shown between calls.
CHUNK = 64


class _Kept(NamedTuple):
    """The stored results of a pair."""

    plan: Plan
    layer_cost: Array
    iterations: Array
    converged: Array
    marginal_error: Array
    fallback: Array
    weight_target: Array | None
    weight_source: Array | None


def _ratio(numerator: Array, denominator: Array) -> Array:
    return jnp.where(denominator > 1e-12, numerator / jnp.where(denominator > 1e-12, denominator, 1.0), 0.0)


def map_gains(zx_nt: Array, zy_nk: Array, to_target_nt: Array, to_source_nk: Array) -> tuple[Array, Array]:
    """Least-squares gains of predictions of standardised rows, per target and per source unit.

    A barycentric map averages, so what it predicts varies too little. The gain Cov(x, x^) / Var(x^) is the factor per
    unit that makes it the best predictor; likewise back. Never negative.
    """

    def gain(z: Array, predicted: Array) -> Array:
        return _ratio(jnp.maximum(jnp.sum(z * predicted, axis=0), 0.0), jnp.sum(predicted * predicted, axis=0))

    return gain(zx_nt, to_target_nt), gain(zy_nk, to_source_nk)


def _kept(site: Site, solver: Solver, gain: bool, form: str, top_k: int | None) -> Callable[..., _Kept]:
    """Makes the function that keeps the result of a pair of layers."""
    properties = solver.properties

    def finish(pair: Array, problem: Problem, result: OTResult) -> _Kept:
        plan = result.plan.attach(problem)
        n, k = problem.cost.shape
        cost, error = result.transport_cost, result.marginal_error
        to_x = to_y = None
        if gain or properties.map_only:
            zx, zy = site.problem(pair[0], pair[1]).features
            to_x, to_y = plan.apply(zy.T).T, plan.apply_transpose(zx.T).T
        if properties.map_only:
            # Maps have no transport cost; their unexplained variance takes its place among layers.
            alive = jnp.sum(zx * zx, axis=0) > 0
            left = jnp.where(alive, jnp.sum(jnp.square(zx - to_x), axis=0), 0.0)
            cost = jnp.sum(left) / jnp.maximum(jnp.sum(alive), 1)
            weights = jnp.ones((n,)), jnp.ones((k,))
        elif properties.balanced:
            weights = jnp.full((n,), jnp.float32(n)), jnp.full((k,), jnp.float32(k))
        else:
            q = plan.magnitude()
            weights = _ratio(jnp.float32(1), jnp.sum(q, axis=1)), _ratio(jnp.float32(1), jnp.sum(q, axis=0))
        if gain:
            gains = map_gains(zx, zy, to_x * weights[0], to_y * weights[1])
            weights = weights[0] * gains[0], weights[1] * gains[1]
        elif properties.balanced:
            weights = None, None
        if form == "sparse":
            plan = SparsePlan.of(plan, top_k)
        elif form == "dense":
            plan = DensePlan(plan.matrix())
        elif isinstance(plan, EntropicPlan):
            plan = replace(plan, cost=None)
        return _Kept(plan, cost, result.iterations, result.converged, error, result.fallback, *weights)

    return finish


@functools.partial(jax.jit, static_argnames=("solver", "gain", "form", "top_k", "mesh"))
def solve_chunk(
    site: Site, pairs: Array, solver: Solver, gain: bool, form: str, top_k: int | None, mesh: Mesh | None
) -> _Kept:
    """Solves pairs of layers [P, 2]; with a mesh, each device its share of them."""

    def some(site: Site, pairs: Array) -> _Kept:
        finish = _kept(site, solver, gain, form, top_k)
        return solve_each(
            solver,
            lambda index: site.problem(pairs[index, 0], pairs[index, 1]),
            pairs.shape[0],
            lambda index, problem, result: finish(pairs[index], problem, result),
        )

    if mesh is None:
        return some(site, pairs)
    split = PartitionSpec(mesh.axis_names)
    return jax.shard_map(some, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False)(
        site, pairs
    )


def _solve_on_host(
    site: Site, pairs: np.ndarray, solver: HostSolver, gain: bool, form: str, top_k: int | None
) -> _Kept:
    """The same for solvers that run in NumPy."""
    finish = _kept(site, solver, gain, form, top_k)
    parts = []
    for pair in pairs:
        problem = prepared(site.problem(*pair), solver)
        parts.append(finish(pair, problem, solver.solve_on_host(jax.device_get(problem))))
    return jax.tree.map(lambda *x: jnp.stack(x), *parts)


def _form(site: Site, solver: Solver, pairs: int, top_k: int | None) -> str:
    """The form in which plans are stored: `own` (factors, matches, maps), `sparse`, `dense` or `potentials`."""
    n, k = site.units
    properties = solver.properties
    dense = 4 * pairs * n * k
    if top_k is not None and not properties.map_only:
        return "sparse" if SparsePlan.bytes(n, k, top_k) * pairs < dense else "dense"
    if not properties.potentials:
        return "own"
    if isinstance(site, CorrelationSite):
        return "dense"
    return "potentials" if features_bytes(site) + 4 * pairs * (n + k) < dense else "dense"


def features_bytes(site: FeatureSite, itemsize: int = 2) -> int:
    """Bytes of the activations of a site, float16 by default."""
    return itemsize * (np.size(site.zx) + np.size(site.zy))


def chunk_of(
    site: Site, solver: Solver, pairs: int, memory_mib: int | None, top_k: int | None, devices: int
) -> tuple[Solver, str, int]:
    """Returns the solver with its memory, the form of stored plans, and the pairs that one call solves."""
    n, k = site.units
    memory_mib = solver_mib(memory_mib)
    if isinstance(solver, MemoryBoundSolver):
        solver = solver.with_memory(memory_mib)
    form = _form(site, solver, pairs, top_k)
    # The results of a chunk take no more than half the memory.
    max_pairs = max(1, min(CHUNK, memory_mib * 2**20 // (8 * n * k))) if form in ("dense", "own") else CHUNK
    return solver, form, min(-(-pairs // devices), max_pairs) * devices


def solve_pairs(
    site: Site,
    solver: Solver,
    *,
    pair_mask_lm: np.ndarray | None = None,
    memory_mib: int | None = None,
    gain: bool = False,
    top_k: int | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SitePlans:
    """Solves the pairs of layers in `pair_mask_lm` (bool [L, M]; None: all pairs) with uniform marginals.

    Costs are made pair by pair and never stored: the solver's memory beside the site is at most `memory_mib` if it has
    such an option. `gain`: weights include the least-squares gains. `top_k`: plans keep only the entries among the
    `top_k` largest of their row or column. `mesh`: pairs are split over its devices. Raises InputError for settings
    that the solver or the site does not support.
    """
    on_host, uses_features = isinstance(solver, HostSolver), isinstance(solver, FeatureSolver)
    layers, sources = site.layers
    check_shape(solver, *site.units)
    if isinstance(site, CorrelationSite) and (uses_features or gain):
        setting = f"solver {solver.name!r}" if uses_features else "alignment.gain"
        raise InputError(f"{setting} needs the activations, which were not kept; set activations.keep: true")
    pair_mask_lm = np.ones((layers, sources), bool) if pair_mask_lm is None else pair_mask_lm
    pairs = np.argwhere(pair_mask_lm).astype(np.int32)
    devices = 1 if mesh is None or on_host else mesh.size
    solver, form, size = chunk_of(site, solver, len(pairs), memory_mib, top_k, devices)
    padded = np.concatenate([pairs, np.repeat(pairs[-1:], -len(pairs) % size, axis=0)])
    parts = []
    for start in range(0, len(padded), size):
        chunk = padded[start : start + size]
        if on_host:
            part = _solve_on_host(site, chunk, solver, gain, form, top_k)
        else:
            part = solve_chunk(site, jnp.asarray(chunk), solver, gain, form, top_k, mesh)
        parts.append(to_host(part))
        progress(min(start + size, len(pairs)), len(pairs))
    joined = jax.tree.map(lambda *x: np.concatenate(x)[: len(pairs)], *parts)
    solutions = joined.plan
    if form == "potentials":
        solutions = REBUILT[type(solutions)](
            solutions.f, solutions.g, solutions.epsilon, *pairs.T, np.asarray(site.zx), np.asarray(site.zy)
        )
    index = np.full((layers, sources), -1, np.int32)
    index[tuple(pairs.T)] = np.arange(len(pairs))
    layer_cost = np.full((layers, sources), np.nan, np.float32)
    layer_cost[tuple(pairs.T)] = joined.layer_cost
    return SitePlans(solutions, index, layer_cost, pair_mask_lm, *joined[2:])


def solve_site(
    x_lnu: Sequence[np.ndarray],
    y_mnu: Sequence[np.ndarray],
    solver: Solver,
    *,
    centred: bool = True,
    feature_dtype: str = "float16",
    pair_mask_lm: np.ndarray | None = None,
    top_k: int | None = None,
    memory_mib: int | None = None,
    gain: bool = False,
    **options: object,
) -> SitePlans:
    """`solve_pairs` from activations [L, N, n] of the target and [M, N, k] of the source, read layer by layer.

    Activations that are stored with the plans are rounded to `feature_dtype` before they are solved. Activations that
    are not stored are replaced by their correlations where float32 activations would take more than half of
    `memory_mib` and more than all correlations do.
    """
    (layers, rows, n), (sources, _, k) = x_lnu.shape, y_mnu.shape
    pairs = int(layers * sources if pair_mask_lm is None else pair_mask_lm.sum())
    entries, every = rows * (layers * n + sources * k), layers * sources * n * k
    shapes = FeatureSite(*(np.broadcast_to(np.float16(0), side.shape) for side in (x_lnu, y_mnu)))
    form = _form(shapes, solver, pairs, top_k)
    needed = form == "potentials" or isinstance(solver, FeatureSolver) or gain
    if not needed and every < entries and 8 * entries > solver_mib(memory_mib) * 2**20:
        site = CorrelationSite.of(x_lnu, y_mnu, centred=centred)
    else:
        site = FeatureSite.of(x_lnu, y_mnu, centred=centred)
    if form == "potentials":
        site = jax.tree.map(lambda z: z.astype(feature_dtype), site)
    chosen = {"pair_mask_lm": pair_mask_lm, "top_k": top_k, "memory_mib": memory_mib, "gain": gain}
    return solve_pairs(site, solver, **chosen, **options)
