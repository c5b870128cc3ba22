"""Per-unit statistics of activations: what turns a plan between standardised units into a map between real ones."""

from dataclasses import dataclass

import jax
import numpy as np

from tmjax.ot.cost import CONSTANT
from tmjax.typing import ArrayLike


@jax.tree_util.register_dataclass
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


def statistics(x_snu: np.ndarray) -> Statistics:
    """Statistics over rows of `[layer, row, unit]`, accumulated in float64 one layer at a time.

    A constant unit gets standard deviation 0.
    """
    columns = []
    for layer in x_snu:
        x = np.asarray(layer, np.float64)
        rms, std = np.sqrt(np.mean(x * x, axis=0)), x.std(axis=0)
        columns.append((x.mean(axis=0), np.where(std > CONSTANT * rms, std, 0.0), rms, np.abs(x).mean(axis=0)))
    return Statistics(*(np.stack(values).astype(np.float32) for values in zip(*columns, strict=True)))
