"""Controls: what a merge must beat before its gain may be credited to the source (DESIGN section 6).

Each intervenes before alignment and reruns everything downstream with the same budget of trials.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tmjax.align.alignment import Alignment
from tmjax.errors import InputError


@dataclass(frozen=True)
class Control:
    """One control arm: what it changes, as switches that the pipeline reads."""

    name: str
    what: str
    zero_source: bool = False
    random_source: bool = False
    permute_plan: bool = False
    shuffle_rows: bool = False


CONTROLS: Mapping[str, Control] = {
    control.name: control
    for control in (
        Control("control:shrink", "source contribution zero, scales still fitted", zero_source=True),
        Control("control:random_source", "the source's architecture with fresh random weights", random_source=True),
        Control("control:permuted_plan", "source units permuted, per site and pair of layers", permute_plan=True),
        Control("control:shuffled_rows", "source rows paired with other pieces of text", shuffle_rows=True),
    )
}


def derangement(size: int, seed: int) -> np.ndarray:
    """A uniformly random cyclic permutation (Sattolo's algorithm): no element stays."""
    if size < 2:
        raise InputError("the control shuffled_rows needs at least two rows; give more text")
    generator = np.random.default_rng(seed)
    order = np.arange(size)
    for last in range(size - 1, 0, -1):
        other = generator.integers(last)
        order[last], order[other] = order[other], order[last]
    return order


def plan_permutations(alignment: Alignment, seed: int) -> dict[str, np.ndarray]:
    """An independent permutation of the source units for every plan site and pair of layers: [L, M, k] each.

    Permuting the source's columns before the solver permutes the plan's columns with them, so nothing is solved again:
    the transport reads the unpermuted weights through the permuted plan.
    """
    generator = np.random.default_rng(seed)
    shapes = {site: (*held.index.shape, alignment.source[site].mean.shape[1]) for site, held in alignment.plans.items()}
    return {
        site: generator.permuted(np.broadcast_to(np.arange(shape[2]), shape), axis=2) for site, shape in shapes.items()
    }
