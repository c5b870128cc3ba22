"""Per-unit statistics of activations: what turns a plan between standardised units into a map between real ones."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tmjax.ot.cost import CONSTANT
from tmjax.typing import ArrayLike, pytree_dataclass

#: Units whose float64 copies stay in a core's cache while several passes read them.
BLOCK = 256


@pytree_dataclass
@dataclass(frozen=True)
class Statistics:
    """Mean, standard deviation, root mean square and mean absolute value of each unit, all [layer, unit] float32."""

    mean: ArrayLike
    std: ArrayLike
    rms: ArrayLike
    mean_abs: ArrayLike

    def centre(self, centred: bool) -> ArrayLike:
        """The mean that maps subtract: zero for uncentred (cosine) alignment."""
        return self.mean if centred else self.mean * 0

    def scale(self, centred: bool) -> ArrayLike:
        """The scale s of a unit: standard deviation, or root mean square for uncentred alignment."""
        return self.std if centred else self.rms


def _of_units(x_nu: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean, standard deviation, root mean square and mean absolute value of columns, in float64."""
    x = np.asarray(x_nu, np.float64)
    rms, std = np.sqrt(np.mean(x * x, axis=0)), x.std(axis=0)
    return x.mean(axis=0), np.where(std > CONSTANT * rms, std, 0.0), rms, np.abs(x).mean(axis=0)


def statistics(x_snu: Sequence[np.ndarray]) -> Statistics:
    """Statistics over rows of layers [row, unit], accumulated in float64, BLOCK units at a time on all cores.

    A layer is read once and then forgotten. A constant unit gets standard deviation 0.
    """
    layers = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for x_nu in x_snu:
            blocks = [x_nu[:, start : start + BLOCK] for start in range(0, x_nu.shape[1], BLOCK)]
            layers.append([np.concatenate(values) for values in zip(*pool.map(_of_units, blocks), strict=True)])
    return Statistics(*(np.stack(values).astype(np.float32) for values in zip(*layers, strict=True)))
