"""Alignment from sums over rows, for runs whose activations are too large to keep."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from tmjax.activations.blocks import Block
from tmjax.align import moments
from tmjax.align.alignment import Alignment, assemble, needed_sites, plan_site, solver_of, structured
from tmjax.align.features import CorrelationSite
from tmjax.align.moments import Moments, Sum, UnitMoments
from tmjax.align.pairs import coarse_costs
from tmjax.align.plans import solve_pairs
from tmjax.align.site_plans import SitePlans
from tmjax.align.statistics import Statistics
from tmjax.align.structure.structured import Described, require_structure
from tmjax.errors import InputError
from tmjax.models.spec import ParamSpec
from tmjax.ot import FeatureSolver
from tmjax.recipes.merge import AlignmentOptions


def require_streamable(options: AlignmentOptions) -> None:
    """Raises InputError if the options need all rows at once."""
    solver = solver_of(options)
    require_structure(options, solver)
    if isinstance(solver, FeatureSolver) or options.gain:
        setting = "alignment.gain" if options.gain else f"solver {solver.name!r}"
        raise InputError(f"{setting} needs the activations themselves; set activations.keep: true")


def gather(
    blocks: Iterable[Block],
    projections: Collection[ParamSpec],
    *,
    order: Callable[[int], np.ndarray] | None = None,
    structure: str = "none",
) -> dict[str, Moments]:
    """Moments of every site that these projections need (for this structure), from blocks of paired rows.

    `order(rows)` reorders the source's rows within each block (a control); blocks of one row are then left out.
    """
    site_moments: dict[str, Moments] = {}
    for target, source, mask in blocks:
        rows = int(mask.sum())
        if order is not None:
            mask = mask & (rows > 1)
            chosen = np.arange(len(mask))
            chosen[:rows] = order(rows) if rows > 1 else chosen[:rows]
            source = {site: y[:, chosen] for site, y in source.items()}
        for site in needed_sites(projections, structure):
            x, y = target[site], source[site]
            if site not in site_moments:
                sizes = x.shape[0], y.shape[0], x.shape[2], y.shape[2]
                site_moments[site] = moments.start(*sizes, cross=plan_site(site) == site)
            site_moments[site] = moments.update(site_moments[site], x, y, mask)
    return site_moments


def align_moments(
    site_moments: Mapping[str, Moments],
    projections: Mapping[str, ParamSpec],
    options: AlignmentOptions,
    *,
    models: tuple[Described, Described] | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Alignment:
    """`align` from moments; plans are stored dense. Raises InputError for options that need all rows at once."""
    require_streamable(options)

    def site_of(site: str) -> CorrelationSite:
        return CorrelationSite(moments.correlations(site_moments[site], centred=options.centred))

    def solve(site: str, pair_mask: np.ndarray | None) -> SitePlans:
        return solve_pairs(
            site_of(site),
            solver_of(options),
            pair_mask_lm=pair_mask,
            memory_mib=options.memory_mib,
            top_k=options.plan_top_k,
            mesh=mesh,
        )

    def measure(site: str) -> tuple[Statistics, Statistics]:
        return moments.unit_statistics(site_moments[site])

    return assemble(
        projections,
        options,
        int(next(iter(site_moments.values())).count),
        measure=measure,
        guess=lambda site: coarse_costs(site_of(site), options),
        solve=structured(solve, models, options, site_of, measure),
        progress=progress,
    )


def save_moments(site_moments: Mapping[str, Moments], path: Path) -> None:
    """Writes the moments of sites into one safetensors file."""
    arrays = {}
    for site, value in site_moments.items():
        for keys, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            arrays["/".join([site, *(key.name for key in keys)])] = np.asarray(leaf)
    save_file(arrays, path)


def load_moments(path: Path) -> dict[str, Moments]:
    """Reads moments written by `save_moments`."""
    arrays = load_file(path)

    def sum_of(prefix: str) -> Sum | None:
        return Sum(arrays[f"{prefix}/high"], arrays[f"{prefix}/low"]) if f"{prefix}/high" in arrays else None

    def units(prefix: str) -> UnitMoments:
        return UnitMoments(*(sum_of(f"{prefix}/{field.name}") for field in fields(UnitMoments)))

    sites = dict.fromkeys(name.split("/")[0] for name in arrays)
    return {
        site: Moments(
            arrays[f"{site}/count"], units(f"{site}/target"), units(f"{site}/source"), sum_of(f"{site}/cross")
        )
        for site in sites
    }
