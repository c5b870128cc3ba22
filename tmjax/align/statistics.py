"""Per-unit statistics of activations: what turns a plan between standardised units into a map between real ones."""

import os
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


def statistics(x_snu: np.ndarray) -> Statistics:
    """Statistics over rows of `[layer, row, unit]`, accumulated in float64, BLOCK units at a time on all cores.

    A constant unit gets standard deviation 0.
    """
    layers, _, units = x_snu.shape
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [(layer, start) for layer in range(layers) for start in range(0, units, BLOCK)]
        parts = list(pool.map(lambda at: _of_units(x_snu[at[0], :, at[1] : at[1] + BLOCK]), work))
    return Statistics(
        *(np.concatenate(values).reshape(layers, units).astype(np.float32) for values in zip(*parts, strict=True))
    )
