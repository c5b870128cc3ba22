"""Alignment that respects a transformer's structure: plans that sites share, attention matched head by head."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.align.features import CorrelationSite, Site
from tmjax.align.pairs import couple
from tmjax.align.plans import solve_pairs
from tmjax.align.site_plans import SitePlans
from tmjax.align.statistics import Statistics
from tmjax.align.structure.heads import ATTENTION_SITES, AttentionSide, match_heads, value_maps
from tmjax.errors import InputError
from tmjax.models.sites import SITES
from tmjax.models.spec import DecoderSpec
from tmjax.ot import FeatureSolver, Problem, Solver, cost_matrix, solve
from tmjax.recipes.merge import AlignmentOptions
from tmjax.typing import Params

#: Sites in the residual stream's units. Those of the first group are the stream itself and the branches added to it.
STREAM_SITES = ("resid", "attn_out", "mlp_out")
RESIDUAL_SITES = (*STREAM_SITES, "attn_in", "mlp_in")
#: A model: its spec and its parameters, of which only the norms of queries and keys are read.
Described = tuple[DecoderSpec, Params]
Solve = Callable[[str, np.ndarray | None], SitePlans]


def structured_sites(sites: Collection[str], structure: str) -> tuple[str, ...]:
    """These sites and those that the structure needs beside them."""
    all_sites = list(sites)
    if structure != "none" and set(all_sites) & set(ATTENTION_SITES):
        all_sites += ATTENTION_SITES
    if structure == "full":
        all_sites += STREAM_SITES
    return tuple(dict.fromkeys(all_sites))


def require_structure(options: AlignmentOptions, solver: Solver) -> None:
    """Raises InputError for solvers and options that a structured alignment has no use for."""
    if options.structure == "none":
        return
    if isinstance(solver, FeatureSolver):
        raise InputError(f"alignment.structure needs couplings from costs, which solver {solver.name!r} does not find")
    if options.gain:
        raise InputError("alignment.gain is for plans of single units; set alignment.structure: none")


@dataclass(frozen=True)
class Structure:
    """Solves sites together instead of one by one: `solve` takes the place of the plain one.

    `plain` solves a site by itself, `site_of` gives its problems, `measure` its statistics (target, source). `solved`
    keeps the plans of sites that are solved together.
    """

    target: Described
    source: Described
    options: AlignmentOptions
    solver: Solver
    plain: Solve
    site_of: Callable[[str], Site]
    measure: Callable[[str], tuple[Statistics, Statistics]]

    solved: dict[str, Mapping[str, SitePlans]] = field(default_factory=dict)

    def solve(self, site: str, pair_mask: np.ndarray | None) -> SitePlans:
        """The plans of a site; `pair_mask` must be the same for all sites."""
        for name, sites, work in (
            ("attention", ATTENTION_SITES, self._attention),
            ("residual", RESIDUAL_SITES if self.options.structure == "full" else (), self._residual),
        ):
            if site in sites:
                if name not in self.solved:
                    self.solved[name] = work(pair_mask)
                return self.solved[name][site]
        return self.plain(site, pair_mask)

    def _attention(self, pair_mask: np.ndarray | None) -> dict[str, SitePlans]:
        sites = {site: self.site_of(site) for site in ("q", "k", "v")}
        target, source = (
            AttentionSide.of(*model, {site: self.measure(site)[end] for site in sites}, centred=self.options.centred)
            for end, model in enumerate((self.target, self.source))
        )
        pairs = _pairs(sites["q"], pair_mask)
        matches, costs = [], []
        for pair in pairs:
            rho = {name: correlations(site, *pair) for name, site in sites.items()}
            match = match_heads(target, source, *pair, rho)
            whole = rho["v"].reshape(*target.scales["v"].shape[1:], *source.scales["v"].shape[1:])
            costs.append(1.0 - whole[match.groups.target, :, match.groups.source])
            matches.append(match)
        result = solve(Problem.with_uniform_marginals(jnp.asarray(np.stack(costs), jnp.float32)), self.solver)
        plans = np.asarray(result.matrix())
        maps = [value_maps(target, source, *args) for args in zip(pairs, matches, plans, strict=True)]
        worst = {name: np.asarray(getattr(result, name)).max(axis=1) for name in ("iterations", "fallback")}
        worst["marginal_error"] = np.asarray(result.marginal_error).max(axis=1)
        worst["converged"] = np.asarray(result.converged).all(axis=1)
        value_cost = (np.asarray(result.transport_cost) / np.abs(plans).sum(axis=(2, 3))).mean(axis=1)
        solved = {}
        for site in ATTENTION_SITES:
            head_map = jax.tree.map(lambda *x: np.stack(x), *(each[site] for each in maps))
            cost = [match.costs[site] for match in matches] if site in ("q", "k") else value_cost
            index, layer_cost = np.full((2, *sites["q"].layers), -1.0)
            index[tuple(pairs.T)], layer_cost[tuple(pairs.T)] = np.arange(len(pairs)), cost
            index, known = index.astype(np.int32), index >= 0
            units = (np.ones((len(pairs), size), np.float32) for size in _sizes(target, source, site))
            layer_cost = np.where(known, layer_cost, np.nan).astype(np.float32)
            ends = dict(zip(("weight_target", "weight_source"), units, strict=True))
            solved[site] = SitePlans(head_map, index, layer_cost, known, **worst, **ends)
        return solved

    def _residual(self, pair_mask: np.ndarray | None) -> dict[str, SitePlans]:
        if self.options.residual == "layer":
            return dict.fromkeys(RESIDUAL_SITES, self.plain("resid", pair_mask))
        sites = [self.site_of(site) for site in STREAM_SITES]
        pairs = [tuple(pair) for pair in _pairs(sites[0], pair_mask)]

        def mean(pair: tuple[int, int]) -> np.ndarray:
            return np.mean([correlations(site, *pair) for site in sites], axis=0)

        # How alike two depths are, before it is known which unit is which: by every unit's best partner.
        guess = np.full(sites[0].layers, np.nan, np.float32)
        for pair in pairs:
            rho = mean(pair)
            guess[pair] = 1.0 - (rho.max(axis=1).mean() + rho.max(axis=0).mean()) / 2
        weights, _ = couple(np.where(np.isnan(guess), np.nanmax(guess), guess), self.options, pair_mask)
        total = sum(weights[pair] for pair in pairs)
        rho = sum(weights[pair] / total * mean(pair) for pair in pairs if weights[pair] > 0)
        site = CorrelationSite(jnp.asarray(rho, jnp.float32)[None, None])
        one = solve_pairs(site, self.solver, memory_mib=self.options.memory_mib, top_k=self.options.plan_top_k)
        q = np.asarray(one.plan(0, 0), np.float64)
        cost = np.full(guess.shape, np.nan, np.float32)
        for pair in pairs:
            cost[pair] = 1.0 - (q * mean(pair)).sum() / np.abs(q).sum()
        known = np.isfinite(cost)
        tied = replace(one, index=np.where(known, 0, -1).astype(np.int32), layer_cost=cost, solved=known)
        return dict.fromkeys(RESIDUAL_SITES, tied)


def correlations(site: Site, layer: int, source_layer: int) -> np.ndarray:
    """Correlations [n, k] of a pair of layers, float32."""
    return 1.0 - np.asarray(cost_matrix(site.problem(layer, source_layer).cost))


def _pairs(site: Site, pair_mask: np.ndarray | None) -> np.ndarray:
    return np.argwhere(np.ones(site.layers, bool) if pair_mask is None else pair_mask)


def _sizes(target: AttentionSide, source: AttentionSide, site: str) -> tuple[int, int]:
    return tuple(side.spec.axis_size(SITES[site]) for side in (target, source))
