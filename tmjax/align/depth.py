"""Monotone coupling of depths: which source layer does a target layer's work, in order, by dynamic programming."""

import numpy as np

from tmjax.errors import InputError


def monotone_matches(cost_lm: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """The coupling [L, M] of min(L, M) pairs of layers of least total cost that do not cross, one partner at most each.

    Entries are 1 / min(L, M) or 0. Layers of the deeper model that are left over have no partner: an identity layer
    has no work to be done. (Global alignment as of Needleman and Wunsch 1970, with free gaps on the deeper side.)
    Raises InputError if the `allowed` pairs do not suffice.
    """
    cost = np.asarray(cost_lm, np.float64)
    if allowed is not None:
        cost = np.where(allowed, cost, np.inf)
    flip = cost.shape[0] > cost.shape[1]
    cost = cost.T if flip else cost
    short, long = cost.shape
    best = np.full((short + 1, long + 1), np.inf)  # of the first i layers matched within the first j
    best[0] = 0.0
    for i in range(1, short + 1):
        for j in range(i, long + 1):
            best[i, j] = min(best[i, j - 1], best[i - 1, j - 1] + cost[i - 1, j - 1])
    if not np.isfinite(best[-1, -1]):
        raise InputError("the pairs of layers that were kept hold no monotone coupling; use alignment.layer_pairs: all")
    plan = np.zeros(cost.shape, np.float32)
    i, j = short, long
    while i:
        if best[i, j] == best[i, j - 1]:
            j -= 1
            continue
        i, j = i - 1, j - 1
        plan[i, j] = 1.0 / short
    return plan.T if flip else plan
