"""`align`: plans for every site a merge needs, statistics of every unit, layer plans of every projection."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import Mesh

from tmjax.activations.store import Activations
from tmjax.align.layers import LayerPlan
from tmjax.align.pairs import by_site, choose, coarse_costs, completed, layer_plans
from tmjax.align.plans import SitePlans, solve_site
from tmjax.align.sites import FeatureSite
from tmjax.align.statistics import Statistics, statistics
from tmjax.models.spec import ParamSpec
from tmjax.ot import Solver, make_solver, solver_options
from tmjax.recipe import AlignmentOptions

#: gate and up write what down reads, unit by unit: the three share the plan of `mlp_hidden`, each with its own scales.
SHARED_PLAN: Mapping[str, str] = {"gate": "mlp_hidden", "up": "mlp_hidden"}


def plan_site(site: str) -> str:
    """The site whose plan aligns the units of `site`."""
    return SHARED_PLAN.get(site, site)


def needed_sites(rows: Collection[ParamSpec]) -> tuple[str, ...]:
    """All sites whose activations the transport of these projections needs."""
    found = [site for row in rows for end in (row.input_site, row.output_site) for site in (end, plan_site(end))]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Alignment:
    """Everything `fuse` needs once the activations are gone.

    `plans` by plan site; statistics by site; `layer_plans` by role. `centred` says whether means are subtracted.
    """

    centred: bool
    rows: int
    plans: Mapping[str, SitePlans]
    target: Mapping[str, Statistics]
    source: Mapping[str, Statistics]
    layer_plans: Mapping[str, LayerPlan]
    layer_certificates: Mapping[str, float]

    def certificates(self) -> dict[str, dict[str, float | int | str | None]]:
        """Per plan site: problems solved, how many converged, largest L1 marginal error (None for maps), iterations."""
        found = {}
        for site, plans in self.plans.items():
            error = float(plans.marginal_error.max())
            found[site] = {
                "problems": int(plans.converged.size),
                "converged": int(plans.converged.sum()),
                "max_marginal_error": None if np.isnan(error) else error,
                "max_iterations": int(plans.iterations.max()),
                "log_domain": int(plans.fallback.sum()),
                "pairs": int(np.size(plans.index)),
                "stored": plans.stored,
            }
        return found

    def layer_facts(self) -> dict[str, dict[str, float]]:
        """Per projection: the share of the layer plan's mass that was left out, mean and worst target layer."""
        return {
            role: {"dropped_mean": float(np.mean(plan.dropped)), "dropped_max": float(np.max(plan.dropped))}
            for role, plan in self.layer_plans.items()
        }


def solver_of(options: AlignmentOptions) -> Solver:
    """The neuron-plan solver that the options name; what `solver_options` says wins over the common options.

    Raises InputError for unknown solvers and options.
    """
    known = solver_options(options.solver)
    common = {name: getattr(options, name) for name in ("epsilon", "threshold", "max_iterations") if name in known}
    return make_solver(options.solver, **common | options.solver_options)


def align(
    target: Activations,
    source: Activations,
    projections: Mapping[str, ParamSpec],
    options: AlignmentOptions | None = None,
    *,
    source_rows: np.ndarray | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Alignment:
    """Aligns two models from their activations: plans of the pairs of layers of every plan site, layer plans.

    `projections` are the ParamSpec rows to be transported, by role. Every pair is solved, or those that a cheap guess
    at P keeps (`options.layer_pairs`); held are those with a weight in P. `source_rows` reorders the source's rows (a
    control). `mesh`: pairs are split over its devices. Raises RowMismatchError if the rows of the two do not pair the
    same text.
    """
    options = options or AlignmentOptions()
    target.rows.require_same(source.rows)

    def both(site: str) -> tuple[np.ndarray, np.ndarray]:
        x, y = target.site(site), source.site(site)
        return x, y if source_rows is None else y[:, source_rows]

    def guess(site: str) -> np.ndarray:
        return coarse_costs(FeatureSite.of(*both(site), centred=options.centred), options)

    def solve(site: str, wanted: np.ndarray | None) -> SitePlans:
        return solve_site(
            *both(site),
            solver_of(options),
            centred=options.centred,
            feature_dtype=options.feature_dtype,
            wanted_lm=wanted,
            memory_mib=options.memory_mib,
            gain=options.gain,
            top_k=options.plan_top_k,
            mesh=mesh,
        )

    def measure(site: str) -> tuple[Statistics, Statistics]:
        x, y = both(site)
        return statistics(x), statistics(y)

    return assemble(
        projections, options, len(target.rows), measure=measure, guess=guess, solve=solve, progress=progress
    )


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
    """The alignment, from what can be asked of every site: statistics, a guess at its layer costs, its plans."""
    sites = needed_sites(projections.values())
    ends = {role: (plan_site(row.input_site), plan_site(row.output_site)) for role, row in projections.items()}
    plan_sites = list(dict.fromkeys(plan_site(site) for site in sites))
    guesses, wanted, allowed = {}, dict.fromkeys(plan_sites), None
    if options.layer_pairs != "all":
        guesses = {site: guess(site) for site in plan_sites}
        allowed = choose(guesses, ends, options)
        wanted = by_site(allowed, ends, plan_sites)
    plans, statistics_of = {}, {}
    for done, site in enumerate(sites):
        statistics_of[site] = measure(site)
        if site in wanted:
            found = solve(site, wanted[site])
            costs = completed(found.layer_cost, found.solved, guesses.get(site))
            plans[site] = replace(found, layer_cost=costs)
        progress(done + 1, len(sites))
    layers, certificates = layer_plans({site: p.layer_cost for site, p in plans.items()}, ends, options, allowed)
    used = by_site({role: plan.weights > 0 for role, plan in layers.items()}, ends, plan_sites)
    return Alignment(
        options.centred,
        rows,
        {site: held.keep(used[site]) for site, held in plans.items()},
        {site: both[0] for site, both in statistics_of.items()},
        {site: both[1] for site, both in statistics_of.items()},
        layers,
        certificates,
    )
