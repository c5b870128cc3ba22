"""`align`: plans for every site a merge needs, statistics of every unit, layer plans of every projection."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from tmjax.activations.store import Activations
from tmjax.align.layers import LayerPlan, combine, layer_plan
from tmjax.align.plans import SitePlans, solve_site
from tmjax.align.statistics import Statistics, statistics
from tmjax.errors import InputError
from tmjax.models.spec import ParamSpec
from tmjax.ot import Solver, capabilities_of, make_solver, solver_options
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

    def certificates(self) -> dict[str, dict[str, float | int]]:
        """Per plan site: problems solved, how many converged, largest L1 marginal error, iterations."""
        return {
            site: {
                "problems": int(plans.converged.size),
                "converged": int(plans.converged.sum()),
                "max_marginal_error": float(plans.marginal_error.max()),
                "max_iterations": int(plans.iterations.max()),
                "stored": plans.stored,
            }
            for site, plans in self.plans.items()
        }


def solver_of(options: AlignmentOptions) -> Solver:
    """The neuron-plan solver that the options name; what `solver_options` says wins over the common options.

    Raises InputError for unknown solvers and options, and for solvers that find maps: plans are couplings.
    """
    known = solver_options(options.solver)
    common = {name: getattr(options, name) for name in ("epsilon", "threshold", "max_iterations") if name in known}
    solver = make_solver(options.solver, **common | options.solver_options)
    if capabilities_of(solver).map_only:
        raise InputError(f"alignment.solver {solver.name!r} finds a linear map, not a coupling; choose another solver")
    return solver


def align(
    target: Activations,
    source: Activations,
    projections: Mapping[str, ParamSpec],
    options: AlignmentOptions | None = None,
    *,
    source_rows: np.ndarray | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Alignment:
    """Aligns two models from their activations; every pair of layers of every plan site is solved.

    `projections` are the ParamSpec rows to be transported, by role. `source_rows` reorders the source's rows (a
    control). Raises RowMismatchError if the rows of the two do not pair the same text.
    """
    options = options or AlignmentOptions()
    target.rows.require_same(source.rows)
    centred = options.cost == "correlation"
    solver = solver_of(options)
    sites = needed_sites(projections.values())
    plans, target_stats, source_stats = {}, {}, {}
    for done, site in enumerate(sites):
        x, y = target.site(site), source.site(site)
        y = y if source_rows is None else y[:, source_rows]
        target_stats[site], source_stats[site] = statistics(x), statistics(y)
        if plan_site(site) == site:
            plans[site] = solve_site(x, y, solver, centred=centred, memory_mib=options.memory_mib)
        progress(done + 1, len(sites))
    couplings, certificates = {}, {}
    for site, held in plans.items():
        result = layer_plan(held.layer_cost, options)
        couplings[site], certificates[site] = np.asarray(result.matrix()), float(result.marginal_error)
    layer_plans = {
        role: combine(
            couplings[plan_site(row.input_site)], couplings[plan_site(row.output_site)], top_k=options.layer_top_k
        )
        for role, row in projections.items()
    }
    return Alignment(centred, len(target.rows), plans, target_stats, source_stats, layer_plans, certificates)
