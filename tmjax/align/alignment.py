"""`align`: plans for every site a merge needs, statistics of every unit, layer plans of every projection."""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from jax.sharding import Mesh

from tmjax.activations.store import Activations, Layers
from tmjax.align.features import FeatureSite, Site
from tmjax.align.layer_plan import LayerPlan
from tmjax.align.pairs import by_site, choose, coarse_costs, completed, layer_plans
from tmjax.align.plans import solve_site
from tmjax.align.site_plans import SitePlans
from tmjax.align.statistics import Statistics, statistics
from tmjax.align.structure.structured import Described, Solve, Structure, require_structure, structured_sites
from tmjax.errors import InputError
from tmjax.models.spec import ParamSpec
from tmjax.ot import Solver, make_solver, solver_class, solver_options
from tmjax.plugins import code_hash
from tmjax.recipes.merge import AlignmentOptions

#: gate and up write what down reads, unit by unit: the three share the plan of `mlp_hidden`, each with its own scales.
SHARED_PLAN: Mapping[str, str] = {"gate": "mlp_hidden", "up": "mlp_hidden"}


def plan_site(site: str) -> str:
    """The site whose plan aligns the units of `site`."""
    return SHARED_PLAN.get(site, site)


def needed_sites(rows: Collection[ParamSpec], structure: str = "none") -> tuple[str, ...]:
    """All sites whose activations the transport of these projections needs, for this `alignment.structure`."""
    sites = [site for row in rows for end in (row.input_site, row.output_site) for site in (end, plan_site(end))]
    return structured_sites(sites, structure)


@dataclass(frozen=True)
class Alignment:
    """Everything `fuse` needs once the activations are gone.

    `plans` by plan site; statistics by site; `layer_plans` by role. `centred` says whether means are subtracted.
    `source_order` [L, M, k] by plan site is the order in which the plans' columns take the source's units, where that
    is not the units' own.
    """

    centred: bool
    rows: int
    plans: Mapping[str, SitePlans]
    target: Mapping[str, Statistics]
    source: Mapping[str, Statistics]
    layer_plans: Mapping[str, LayerPlan]
    layer_certificates: Mapping[str, float]
    source_order: Mapping[str, np.ndarray] = field(default_factory=dict)

    def certificates(self) -> dict[str, dict[str, float | int | str | None]]:
        """Per plan site: problems solved, how many converged, largest L1 marginal error (None for maps), iterations."""
        records = {}
        for site, plans in self.plans.items():
            error = float(plans.marginal_error.max())
            records[site] = {
                "problems": int(plans.converged.size),
                "converged": int(plans.converged.sum()),
                "max_marginal_error": None if np.isnan(error) else error,
                "max_iterations": int(plans.iterations.max()),
                "log_domain": int(plans.fallback.sum()),
                "pairs": int(np.size(plans.index)),
                "stored": plans.stored,
            }
        return records

    def layer_facts(self) -> dict[str, dict[str, float]]:
        """Per projection: the share of the layer plan's mass that was left out, mean and worst target layer."""
        return {
            role: {"dropped_mean": float(np.mean(plan.dropped)), "dropped_max": float(np.max(plan.dropped))}
            for role, plan in self.layer_plans.items()
        }


def solver_of(options: AlignmentOptions) -> Solver:
    """The neuron-plan solver that the options name; `solver_options` take precedence over the common options.

    Raises InputError for unknown solvers and options.
    """
    known = solver_options(options.solver)
    common = {name: getattr(options, name) for name in ("epsilon", "threshold", "max_iterations") if name in known}
    return make_solver(options.solver, **common | options.solver_options)


def solver_hash(options: AlignmentOptions) -> str | None:
    """Returns the SHA-256 of the file of a solver that is not of this package; the plans depend on it."""
    return code_hash(solver_class(options.solver))


def align(
    target: Activations,
    source: Activations,
    projections: Mapping[str, ParamSpec],
    options: AlignmentOptions | None = None,
    *,
    models: tuple[Described, Described] | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Alignment:
    """Aligns two models from their activations: plans of the pairs of layers of every plan site, layer plans.

    `projections` are the ParamSpec rows to be transported, by role. Every pair is solved, or those that a cheap guess
    at P keeps (`options.layer_pairs`); those with a weight in P are kept. `mesh`: pairs are split over its devices.
    `models`, the specs and parameters of target and source, are for `options.structure`. Raises RowMismatchError if the
    rows of the two do not pair the same text, InputError if a structure is asked for without the models.
    """
    options = options or AlignmentOptions()
    target.rows.require_same(source.rows)

    def both(site: str) -> tuple[Layers, Layers]:
        return target.layers_of(site), source.layers_of(site)

    def guess(site: str) -> np.ndarray:
        return coarse_costs(FeatureSite.of(*both(site), centred=options.centred), options)

    def solve(site: str, pair_mask: np.ndarray | None) -> SitePlans:
        return solve_site(
            *both(site),
            solver_of(options),
            centred=options.centred,
            feature_dtype=options.feature_dtype,
            pair_mask_lm=pair_mask,
            memory_mib=options.memory_mib,
            gain=options.gain,
            top_k=options.plan_top_k,
            mesh=mesh,
        )

    @functools.cache
    def measure(site: str) -> tuple[Statistics, Statistics]:
        x, y = both(site)
        return statistics(x), statistics(y)

    def site_of(site: str) -> FeatureSite:
        return FeatureSite.of(*both(site), centred=options.centred)

    how = {"measure": measure, "guess": guess, "solve": structured(solve, models, options, site_of, measure)}
    return assemble(projections, options, len(target.rows), **how, progress=progress)


def structured(
    solve: Solve,
    models: tuple[Described, Described] | None,
    options: AlignmentOptions,
    site_of: Callable[[str], Site],
    measure: Callable[[str], tuple[Statistics, Statistics]],
) -> Solve:
    """The function that solves a site: `solve`, or the structure of the options around it (see `structure`)."""
    solver = solver_of(options)
    require_structure(options, solver)
    if options.structure == "none":
        return solve
    if models is None:
        raise InputError("alignment.structure needs the models beside their activations: pass models to align")
    return Structure(*models, options, solver, solve, site_of, measure).solve


def assemble(
    projections: Mapping[str, ParamSpec],
    options: AlignmentOptions,
    rows: int,
    *,
    measure: Callable[[str], tuple[Statistics, Statistics]],
    guess: Callable[[str], np.ndarray],
    solve: Callable[[str, np.ndarray | None], SitePlans],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Alignment:
    """The alignment, from functions that give a site's statistics, a guess at its layer costs, and its plans."""
    sites = needed_sites(projections.values(), options.structure)
    ends = {role: (plan_site(row.input_site), plan_site(row.output_site)) for role, row in projections.items()}
    plan_sites = list(dict.fromkeys(plan_site(site) for site in sites))
    guesses, pair_masks, allowed = {}, dict.fromkeys(plan_sites), None
    if options.layer_pairs != "all":
        guesses = {site: guess(site) for site in plan_sites}
        allowed = choose(guesses, ends, options)
        if options.whole_layers:
            allowed = dict.fromkeys(ends, np.any(list(allowed.values()), axis=0))
        pair_masks = by_site(allowed, ends, plan_sites)
        if options.structure != "none":
            pair_masks = dict.fromkeys(plan_sites, next(iter(allowed.values())))
    plans, statistics_of = {}, {}
    for done, site in enumerate(sites):
        statistics_of[site] = measure(site)
        if site in pair_masks:
            site_plans = solve(site, pair_masks[site])
            costs = completed(site_plans.layer_cost, site_plans.solved, guesses.get(site))
            plans[site] = replace(site_plans, layer_cost=costs)
        progress(done + 1, len(sites))
    layers, certificates = layer_plans({site: p.layer_cost for site, p in plans.items()}, ends, options, allowed)
    weighed = {role: plan.weights > 0 for role, plan in layers.items()}
    used = by_site(weighed, ends, plan_sites)
    # Of sites that only the structure needs, the pairs that any projection uses.
    used |= {site: np.any(list(weighed.values()), axis=0) for site, pairs in used.items() if np.ndim(pairs) == 0}
    return Alignment(
        options.centred,
        rows,
        {site: site_plans.keep(used[site]) for site, site_plans in plans.items()},
        {site: both[0] for site, both in statistics_of.items()},
        {site: both[1] for site, both in statistics_of.items()},
        layers,
        certificates,
    )
