"""Choice of the pairs of layers that are solved, by a cheap guess at the layer plan P, and the share it leaves out."""

from collections.abc import Collection, Mapping

import numpy as np

from tmjax.align.depth import monotone_matches
from tmjax.align.features import Site
from tmjax.align.layer_plan import LayerPlan, combine, layer_plan
from tmjax.align.plans import solve_pairs
from tmjax.errors import InputError
from tmjax.ot import make_solver
from tmjax.recipes.merge import AlignmentOptions


def coarse_costs(site: Site, options: AlignmentOptions) -> np.ndarray:
    """Layer costs [L, M] from at most `coarse_units` units a side, evenly spaced."""
    solver = make_solver("scaling", epsilon=options.epsilon, threshold=1e-3, max_iterations=200)
    return solve_pairs(site.thinned(options.coarse_units), solver, memory_mib=options.memory_mib).layer_cost


def band(layers: int, sources: int, width: float) -> np.ndarray:
    """Pairs [L, M] whose relative depths differ by at most `width`; every target layer has its nearest."""
    depth = [np.arange(size) / max(size - 1, 1) for size in (layers, sources)]
    distance = np.abs(depth[0][:, None] - depth[1][None, :])
    return distance <= np.maximum(width, distance.min(axis=1, keepdims=True) + 1e-6)


def most_of_the_mass(weights_lm: np.ndarray, share: float) -> np.ndarray:
    """The fewest source layers of every target layer that together hold this share of its weights."""
    order = np.argsort(-weights_lm, axis=1, kind="stable")
    before = np.cumsum(np.take_along_axis(weights_lm, order, axis=1), axis=1)
    before = np.concatenate([np.zeros((len(weights_lm), 1)), before[:, :-1]], axis=1)
    kept = np.zeros(weights_lm.shape, bool)
    np.put_along_axis(kept, order, before < share * weights_lm.sum(axis=1, keepdims=True), axis=1)
    return kept


def completed(layer_cost: np.ndarray, solved: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Layer costs [L, M] with guesses where nothing was solved, shifted by their mean error where something was."""
    if solved.all():
        return layer_cost
    return np.where(solved, layer_cost, guess + np.mean((layer_cost - guess)[solved])).astype(np.float32)


def couple(
    cost_lm: np.ndarray, options: AlignmentOptions, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """The coupling of layers [L, M] that `options.depth` asks for, and its marginal error (0 for matches)."""
    if options.depth == "monotone":
        return monotone_matches(cost_lm, allowed), 0.0
    result = layer_plan(cost_lm, options)
    return np.asarray(result.matrix()), float(result.marginal_error)


def layer_plans(
    costs: Mapping[str, np.ndarray],
    ends: Mapping[str, tuple[str, str]],
    options: AlignmentOptions,
    allowed: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, LayerPlan], dict[str, float]]:
    """Layer plans of projections (role -> its plan sites) from the layer costs of sites; their marginal errors.

    Where layers are matched as a whole, it is by the mean cost of all sites.
    """
    couplings, certificates = {}, {}
    monotone = options.depth == "monotone"
    if options.whole_layers:
        whole = np.mean(list(costs.values()), axis=0)
        both = None if allowed is None else np.any(list(allowed.values()), axis=0)
        one = couple(whole, options, both)
        couplings, certificates = dict.fromkeys(costs, one[0]), dict.fromkeys(costs, one[1])
    else:
        for site, cost in costs.items():
            couplings[site], certificates[site] = couple(cost, options)
    plans = {
        role: combine(
            couplings[into],
            couplings[out],
            top_k=options.layer_top_k,
            allowed=None if allowed is None else allowed[role],
            gaps=monotone,
        )
        for role, (into, out) in ends.items()
    }
    return plans, certificates


def choose(
    guesses: Mapping[str, np.ndarray], ends: Mapping[str, tuple[str, str]], options: AlignmentOptions
) -> dict[str, np.ndarray]:
    """Pairs [L, M] that each projection keeps, by `options.layer_pairs`, from guessed layer costs."""
    if options.layer_pairs == "band":
        shape = next(iter(guesses.values())).shape
        return dict.fromkeys(ends, band(*shape, options.layer_band))
    if options.layer_pairs == "coarse":
        soft = {"layer_top_k": None, "depth": "entropic"}
        plans, _ = layer_plans(guesses, ends, options.model_copy(update=soft))
        return {role: most_of_the_mass(plan.weights, options.layer_mass) for role, plan in plans.items()}
    raise InputError(f"alignment.layer_pairs {options.layer_pairs!r} chooses nothing")


def by_site(kept: Mapping[str, np.ndarray], ends: Mapping[str, tuple[str, str]], sites: Collection[str]) -> dict:
    """Pairs [L, M] that a site must have for the projections that use it."""
    return {site: np.any([kept[role] for role, both in ends.items() if site in both], axis=0) for site in sites}
