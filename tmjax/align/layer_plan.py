"""The layer plan P: which source layers feed which target layer."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from tmjax.errors import InputError
from tmjax.ot import OTResult, Problem, make_solver, solve
from tmjax.recipes.merge import AlignmentOptions


def scale_layer_cost(cost_lm: np.ndarray, how: str) -> np.ndarray:
    """`median`: (cost - min) / median(cost - min), done by the authors' code, not printed in the paper; or `none`."""
    if how == "none":
        return cost_lm
    shifted = cost_lm - cost_lm.min()
    median = np.median(shifted)
    return shifted / median if median > 0 else shifted


def layer_plan(cost_lm: np.ndarray, options: AlignmentOptions) -> OTResult:
    """Entropic coupling P [L, M] of layers on <C, Q>, uniform marginals (METHOD section 1.4)."""
    solver = make_solver(
        "sinkhorn",
        epsilon=options.layer_epsilon,
        threshold=options.layer_threshold,
        max_iterations=options.layer_max_iterations,
    )
    cost = scale_layer_cost(np.asarray(cost_lm, np.float32), options.layer_cost_scale)
    return solve(Problem.with_uniform_marginals(jnp.asarray(cost)), solver)


@dataclass(frozen=True)
class LayerPlan:
    """Layer plans of one projection, [L, M]: from its input site, its output site, and P_eff = sqrt(P_pre P_post).

    `weights` are P_eff with each row scaled to sum 1: P_eff itself is not a coupling. Rows of a monotone plan may be
    empty: such target layers have no partner, and a merge leaves them as they are. `dropped` [L] is the share of
    each row of P_eff that was left out (because few pairs were asked for, or few were solved).
    """

    pre: np.ndarray
    post: np.ndarray
    effective: np.ndarray
    weights: np.ndarray
    dropped: np.ndarray


def combine(
    pre: np.ndarray,
    post: np.ndarray,
    top_k: int | None = None,
    allowed: np.ndarray | None = None,
    *,
    gaps: bool = False,
) -> LayerPlan:
    """P_eff of two layer plans; with `top_k` only the largest entries of each row are kept (paper, appendix A.1).

    `allowed` (bool [L, M]) are the pairs that may be kept. Raises InputError for a row without mass unless `gaps`.
    """
    full = np.sqrt(pre * post)
    effective = full if allowed is None else np.where(allowed, full, 0.0)
    if top_k is not None and top_k < effective.shape[1]:
        effective = effective.copy()
        np.put_along_axis(effective, np.argsort(effective, axis=1)[:, :-top_k], 0.0, axis=1)
    mass = effective.sum(axis=1, keepdims=True)
    if not gaps and not (mass > 0).all():
        raise InputError("a target layer is matched with no source layer; raise alignment.layer_epsilon")
    some = np.where(mass > 0, mass, 1.0)
    dropped = np.where(mass > 0, 1.0 - mass / np.maximum(full.sum(axis=1, keepdims=True), 1e-30), 0.0)
    return LayerPlan(pre, post, effective, effective / some, dropped[:, 0].astype(full.dtype))
