"""The transport problems of one site, one for every pair of layers, made when they are solved."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.errors import NonFiniteError
from tmjax.ot import FeatureCost, Problem, standardise
from tmjax.ot.cost import correlation
from tmjax.typing import Array, ArrayLike, pytree_dataclass


def _standardised(x_nu: np.ndarray, centred: bool, dtype: str = "float32") -> np.ndarray:
    """A layer's standardised activations; raises NonFiniteError for NaN and infinity."""
    z = np.asarray(standardise(jnp.asarray(x_nu), centre=centred).astype(dtype))
    if not np.isfinite(z).all():
        raise NonFiniteError("activations hold NaN or infinity; transport needs finite costs")
    return z


@pytree_dataclass
@dataclass(frozen=True)
class FeatureSite:
    """Standardised activations zx [L, N, n] of the target and zy [M, N, k] of the source, float32 or float16."""

    zx: ArrayLike
    zy: ArrayLike

    @classmethod
    def of(
        cls, x_lnu: Sequence[np.ndarray], y_mnu: Sequence[np.ndarray], *, centred: bool, dtype: str = "float32"
    ) -> "FeatureSite":
        """From activations; `centred` subtracts means. Raises NonFiniteError for NaN and infinity.

        Float16 changes a correlation by about 3e-4 / sqrt(N), where chance alone makes 1 / sqrt(N); whatever is solved
        and certified is the problem of the rounded activations.
        """

        def side(x_snu: Sequence[np.ndarray]) -> Array:
            # One layer at a time: the activations lie on disk and need never be in memory as a whole.
            z = np.empty(x_snu.shape, dtype)
            for number, layer in enumerate(x_snu):
                z[number] = _standardised(layer, centred, dtype)
            return jnp.asarray(z)

        return cls(side(x_lnu), side(y_mnu))

    @property
    def layers(self) -> tuple[int, int]:
        """L and M."""
        return self.zx.shape[0], self.zy.shape[0]

    @property
    def units(self) -> tuple[int, int]:
        """n and k."""
        return self.zx.shape[2], self.zy.shape[2]

    def problem(self, layer: Array | int, source_layer: Array | int) -> Problem:
        """The problem of a pair of layers; indices may be traced."""
        zx, zy = (jnp.asarray(z)[at] for z, at in ((self.zx, layer), (self.zy, source_layer)))
        features = zx.astype(jnp.float32), zy.astype(jnp.float32)
        return Problem.with_uniform_marginals(FeatureCost(zx, zy), features)

    def thinned(self, max_units: int) -> "FeatureSite":
        """The site with at most `max_units` units a side, evenly spaced."""

        def some(z: Array) -> Array:
            units = z.shape[2]
            return z if units <= max_units else z[:, :, np.linspace(0, units - 1, max_units).round().astype(int)]

        return FeatureSite(some(self.zx), some(self.zy))


@pytree_dataclass
@dataclass(frozen=True)
class CorrelationSite:
    """Correlations rho [L, M, n, k] of all pairs of layers, where activations were not kept (see `moments`) or are
    larger than these."""

    rho: ArrayLike

    @classmethod
    def of(cls, x_lnu: Sequence[np.ndarray], y_mnu: Sequence[np.ndarray], *, centred: bool) -> "CorrelationSite":
        """From activations, of which one layer of the source is held at a time; as `FeatureSite.of`."""
        own = [jnp.asarray(_standardised(layer, centred)) for layer in x_lnu]
        rho = np.empty((len(x_lnu), len(y_mnu), own[0].shape[1], y_mnu.shape[2]), np.float32)
        for source_layer, y_nu in enumerate(y_mnu):
            zy = jnp.asarray(_standardised(y_nu, centred))
            for layer, zx in enumerate(own):
                rho[layer, source_layer] = _correlation(zx, zy)
        return cls(jnp.asarray(rho))

    @property
    def layers(self) -> tuple[int, int]:
        """L and M."""
        return self.rho.shape[:2]

    @property
    def units(self) -> tuple[int, int]:
        """n and k."""
        return self.rho.shape[2:]

    def problem(self, layer: Array | int, source_layer: Array | int) -> Problem:
        """The problem of a pair of layers; indices may be traced."""
        return Problem.with_uniform_marginals(1.0 - jnp.asarray(self.rho)[layer, source_layer])

    def thinned(self, max_units: int) -> "CorrelationSite":
        """The site with at most `max_units` units a side, evenly spaced."""
        chosen = [
            np.unique(np.linspace(0, units - 1, min(units, max_units)).round().astype(int)) for units in self.units
        ]
        return CorrelationSite(jnp.asarray(self.rho)[:, :, chosen[0]][:, :, :, chosen[1]])


_correlation = jax.jit(correlation)


Site = FeatureSite | CorrelationSite
