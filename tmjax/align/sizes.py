"""Sizes of the sites that an alignment needs, and whether the solver has room for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tmjax.align.alignment import needed_sites, plan_site, solver_of
from tmjax.models.sites import SITES
from tmjax.models.spec import DecoderSpec, ParamSpec, projections
from tmjax.ot import MemoryBoundSolver
from tmjax.recipes.merge import ActivationOptions, AlignmentOptions
from tmjax.sharding.memory import solver_mib

#: Entries of a site's activations, of all layers of both models, that a device is taken to hold: 12 GB in float16.
SITE_ENTRIES = 6 * 10**9


class Tabled(Protocol):
    """A model's architecture and its tensor table."""

    spec: DecoderSpec
    rows: tuple[ParamSpec, ...]


@dataclass(frozen=True)
class Sites:
    """Units (target, source) of every site whose activations are needed, and which of them have plans."""

    units: Mapping[str, tuple[int, int]]
    plans: tuple[str, ...]


def sites_of(target: Tabled, source: Tabled, chosen: Mapping[str, ParamSpec], structure: str = "none") -> Sites:
    """The sites that the transport of these projections needs, for this `alignment.structure`."""
    theirs = projections(source.rows)
    units: dict[str, tuple[int, int]] = {}
    for role, row in chosen.items():
        shapes = row.shape(target.spec), theirs[role].shape(source.spec)
        units[row.output_site], units[row.input_site] = (tuple(shape[end] for shape in shapes) for end in (0, 1))
        units.setdefault(plan_site(row.output_site), units[row.output_site])
    sites = needed_sites(chosen.values(), structure)
    for site in sites:
        units.setdefault(site, tuple(side.spec.axis_size(SITES[site]) for side in (target, source)))
    return Sites({site: units[site] for site in sites}, tuple(dict.fromkeys(plan_site(site) for site in sites)))


def require_room(sites: Sites, rows: int, options: AlignmentOptions) -> None:
    """Raises InputError if `alignment.memory_mib` is too little for the solver to work on a pair of some site.

    `rows` are the rows of kept activations, 0 where sums are kept.
    """
    solver = solver_of(options)
    if isinstance(solver, MemoryBoundSolver):
        solver = solver.with_memory(solver_mib(options.memory_mib))
        for site in sites.plans:
            solver.form(sites.units[site], 1, rows)


def row_budget(sites: Sites, layers: tuple[int, int], options: ActivationOptions) -> int | None:
    """The largest number of rows recorded: `activations.max_rows`, or as many as the largest site has room for.

    `layers` are those of target and source. None is no limit: where only sums are kept, or no site is needed.
    """
    if options.max_rows is not None or not options.keep or not sites.units:
        return options.max_rows
    widest = max(layers[0] * n + layers[1] * k for n, k in sites.units.values())
    return max(1, SITE_ENTRIES // widest)
