"""Masks: which target neurons a merge may change (METHOD section 1.5)."""

import numpy as np

from tmjax.align.alignment import Alignment
from tmjax.models.spec import ParamSpec

#: Projections that write into the residual stream are selected by their input neurons, the others by their outputs.
READS_NEURONS = frozenset({"o", "down"})


def top_neurons(mean_abs: np.ndarray, top_k: int | None) -> np.ndarray:
    """[L, n] float32: 1 for the `top_k` units of each layer with the largest mean |activation| (all for None)."""
    mask = np.zeros(mean_abs.shape, np.float32)
    if top_k is None or top_k >= mean_abs.shape[1]:
        return mask + 1
    chosen = np.argsort(-mean_abs, axis=1, kind="stable")[:, :top_k]
    np.put_along_axis(mask, chosen, 1.0, axis=1)
    return mask


def masks(alignment: Alignment, row: ParamSpec, top_k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Masks of a projection's weight, broadcastable to [L, out, in], and of its bias [L, out].

    Rows for projections whose output units are neurons; columns, on the input side, for o and down, whose bias belongs
    to no neuron and is changed as a whole. Both are 0 for target layers that have no partner in the source.
    """
    by_input = row.role in READS_NEURONS
    site = row.input_site if by_input else row.output_site
    mask = top_neurons(np.asarray(alignment.target[site].mean_abs), top_k)
    matched = (np.asarray(alignment.layer_plans[row.role].weights).sum(axis=1) > 0).astype(np.float32)[:, None]
    mask = mask * matched
    return (mask[:, None, :], matched) if by_input else (mask[:, :, None], mask)
