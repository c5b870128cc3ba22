"""Streaming statistics: what alignment needs of one site, from blocks of paired rows that are then forgotten.

Means, centred second moments and centred cross moments are combined block by block with the pairwise formulas of Chan,
Golub and LeVeque 1983 (Algorithms for computing the sample variance, eq. 2.1; the cross moment is their polarisation).
Every accumulator is a compensated float32 sum (Neumaier 1974), so that thousands of blocks lose nothing.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.align.statistics import Statistics
from tmjax.errors import InputError
from tmjax.ot.cost import CONSTANT
from tmjax.typing import Array, ArrayLike, pytree_dataclass


@pytree_dataclass
@dataclass(frozen=True)
class Sum:
    """A compensated float32 sum: `high` is the plain running sum, `low` the sum of what its roundings lost."""

    high: ArrayLike
    low: ArrayLike

    @property
    def value(self) -> ArrayLike:
        """The sum, float32."""
        return self.high + self.low

    @property
    def exact(self) -> np.ndarray:
        """The sum on the host, float64."""
        return np.asarray(self.high, np.float64) + np.asarray(self.low, np.float64)

    def add(self, term: ArrayLike) -> "Sum":
        """Adds one term of the same shape (Knuth's TwoSum, which needs no comparison of sizes)."""
        high = self.high + term
        kept = high - self.high
        return Sum(high, self.low + ((self.high - (high - kept)) + (term - kept)))


@pytree_dataclass
@dataclass(frozen=True)
class UnitMoments:
    """Of each unit, [S, unit] float32: mean, mean absolute value, and centred sum of squares sum (x - mean)^2."""

    mean: Sum
    mean_abs: Sum
    square: Sum


@pytree_dataclass
@dataclass(frozen=True)
class Moments:
    """One site of both models over `count` (int32) rows; `cross` [L, M, n, k] is sum (x - mean_x) (y - mean_y)^T.

    It takes 8 L M n k bytes. The uncentred products are cross + count mean_x mean_y^T, the uncentred sums of squares
    square + count mean^2: sums without cancellation, so they need no accumulators of their own. `cross` is None for a
    site of which only the units' statistics are wanted.
    """

    count: ArrayLike
    target: UnitMoments
    source: UnitMoments
    cross: Sum | None


def _zeros(*shape: int) -> Sum:
    return Sum(jnp.zeros(shape), jnp.zeros(shape))


def start(
    target_layers: int, source_layers: int, target_units: int, source_units: int, *, cross: bool = True
) -> Moments:
    """Moments of no rows: all zero; without `cross` only those of units are kept."""
    target, source = (
        UnitMoments(_zeros(*shape), _zeros(*shape), _zeros(*shape))
        for shape in ((target_layers, target_units), (source_layers, source_units))
    )
    products = _zeros(target_layers, source_layers, target_units, source_units) if cross else None
    return Moments(jnp.zeros((), jnp.int32), target, source, products)


def _block_mean(x_sru: Array, alive_r1: Array, rows: Array) -> Sum:
    """Mean over the rows that count: the float32 mean plus the mean of what remains, which corrects its rounding."""
    first = jnp.sum(jnp.where(alive_r1, x_sru, 0.0), axis=-2) / rows
    rest = jnp.sum(jnp.where(alive_r1, x_sru - first[:, None], 0.0), axis=-2) / rows
    return Sum(first, jnp.zeros_like(first)).add(rest)


def _block(x_sru: ArrayLike, alive_r1: Array, rows: Array) -> tuple[UnitMoments, Array]:
    """Moments of one block and its centred rows [S, R, unit], which are 0 where the mask is."""
    x_sru = x_sru.astype(jnp.float32)
    mean = _block_mean(x_sru, alive_r1, rows)
    # Not minus mean.value: rounding the sum first would throw its low part away.
    centred = jnp.where(alive_r1, (x_sru - mean.high[:, None]) - mean.low[:, None], 0.0)
    square = jnp.sum(centred * centred, axis=-2)
    mean_abs = _block_mean(jnp.abs(x_sru), alive_r1, rows)
    return UnitMoments(mean, mean_abs, Sum(square, jnp.zeros_like(square))), centred


def _difference(a: Sum, b: Sum) -> Array:
    return (b.high - a.high) + (b.low - a.low)


def _combine_units(a: UnitMoments, b: UnitMoments, share: Array, weight: Array) -> tuple[UnitMoments, Array]:
    """Moments of the rows of both, and the shift mean_b - mean_a; `share` is n_b / n, `weight` n_a n_b / n."""
    shift = _difference(a.mean, b.mean)
    return UnitMoments(
        a.mean.add(shift * share),
        a.mean_abs.add(_difference(a.mean_abs, b.mean_abs) * share),
        a.square.add(b.square.high).add(b.square.low).add(shift * shift * weight),
    ), shift


def _combine(
    a: Moments, count: Array, target: UnitMoments, source: UnitMoments, cross: Callable[[Array, Array], Sum]
) -> Moments:
    """Chan's formula for `a` and `count` further rows, whose cross moments of a pair of layers are `cross(l, m)`.

    The loop over pairs keeps one [n, k] product at a time and updates the accumulators in place.
    """
    count_a, count_b = a.count.astype(jnp.float32), count.astype(jnp.float32)
    share = count_b / jnp.maximum(count_a + count_b, 1.0)
    weight = count_a * share
    target, shift_ln = _combine_units(a.target, target, share, weight)
    source, shift_mk = _combine_units(a.source, source, share, weight)
    if a.cross is None:
        return Moments(a.count + count, target, source, None)
    layers, source_layers, n, k = a.cross.high.shape

    def pair(i: Array, sums: Sum) -> Sum:
        layer, other = i // source_layers, i % source_layers

        def add(total: Sum, x_n: Array, y_k: Array) -> Sum:
            added = cross(layer, other)
            return total.add(added.high).add(added.low).add(weight * x_n[:, None] * y_k[None, :])

        # Besides skipping empty blocks, the branch keeps XLA from fusing the sums into the writes below; fused, both
        # writes would read the old `high`, and all of it would be copied for every pair.
        old = Sum(sums.high[i], sums.low[i])
        new = jax.lax.cond(count > 0, add, lambda total, x_n, y_k: total, old, shift_ln[layer], shift_mk[other])
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), sums, new)

    flat = jax.tree.map(lambda x: x.reshape(-1, n, k), a.cross)
    flat = jax.lax.fori_loop(0, layers * source_layers, pair, flat)
    return Moments(a.count + count, target, source, jax.tree.map(lambda x: x.reshape(layers, -1, n, k), flat))


@functools.partial(jax.jit, donate_argnums=0)
def update(state: Moments, x_lrn: ArrayLike, y_mrk: ArrayLike, mask_r: ArrayLike) -> Moments:
    """Adds a block: row r of target activations `x` [L, R, n] and source activations `y` [M, R, k] is the same text.

    Rows with `mask` [R] 0 are left out, whatever they hold; all of them may be. The state is donated: use only the
    result. One compilation per shape and dtype of the block. Raises ValueError if the shapes are not the state's.
    """
    (layers, n), (source_layers, k) = state.target.mean.high.shape, state.source.mean.high.shape
    rows = mask_r.shape[0]
    if x_lrn.shape != (layers, rows, n) or y_mrk.shape != (source_layers, rows, k):
        raise ValueError(f"blocks {x_lrn.shape}, {y_mrk.shape} for moments of {layers} x {n}, {source_layers} x {k}")
    alive_r1 = jnp.asarray(mask_r)[:, None] != 0
    count = jnp.sum(alive_r1, dtype=jnp.int32)
    divisor = jnp.maximum(count, 1).astype(jnp.float32)
    target, dx_lrn = _block(x_lrn, alive_r1, divisor)
    source, dy_mrk = _block(y_mrk, alive_r1, divisor)

    def cross(layer: Array, other: Array) -> Sum:
        product = jnp.einsum("rn,rk->nk", dx_lrn[layer], dy_mrk[other], precision=jax.lax.Precision.HIGHEST)
        return Sum(product, jnp.zeros_like(product))

    return _combine(state, count, target, source, cross)


@jax.jit
def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of both, for example the results of two processes; shapes must agree."""

    def cross(layer: Array, other: Array) -> Sum:
        return jax.tree.map(lambda x: x[layer, other], b.cross)

    return _combine(a, b.count, b.target, b.source, cross)


def _require_rows(state: Moments) -> None:
    if int(state.count) < 1:
        raise InputError("no rows of activations were accumulated; are the texts empty?")


def correlations(state: Moments, *, centred: bool = True) -> Array:
    """Pearson correlations (not `centred`: cosines) of all pairs of units, [L, M, n, k] float32 in [-1, 1].

    Equals `ot.correlation` of the rows after `ot.standardise`; constant units correlate 0. Raises InputError without
    rows, ValueError if the cross moments were not kept.
    """
    _require_rows(state)
    if state.cross is None:
        raise ValueError("these moments were started without cross moments")
    return _correlations(state, centred=centred)


@functools.partial(jax.jit, static_argnames="centred")
def _correlations(state: Moments, *, centred: bool) -> Array:
    rows = state.count.astype(jnp.float32)
    mean_ln, mean_mk = state.target.mean.value, state.source.mean.value

    def reciprocal_norm(units: UnitMoments, mean: Array) -> Array:
        full = jnp.sqrt(units.square.value + rows * mean * mean)
        norm = jnp.sqrt(units.square.value) if centred else full
        alive = norm > CONSTANT * full
        return jnp.where(alive, 1.0 / jnp.where(alive, norm, 1.0), 0.0)

    product = state.cross.value
    if not centred:
        product = product + rows * mean_ln[:, None, :, None] * mean_mk[None, :, None, :]
    product = product * reciprocal_norm(state.target, mean_ln)[:, None, :, None]
    return jnp.clip(product * reciprocal_norm(state.source, mean_mk)[None, :, None, :], -1.0, 1.0)


def unit_statistics(state: Moments) -> tuple[Statistics, Statistics]:
    """Statistics of target and source units, [L, n] and [M, k] float32, as `statistics` gives them for all rows.

    Constant units get standard deviation 0. Raises InputError without rows.
    """
    _require_rows(state)
    rows = int(state.count)
    sides = []
    for units in (state.target, state.source):
        mean, variance = units.mean.exact, np.maximum(units.square.exact, 0.0) / rows
        std, rms = np.sqrt(variance), np.sqrt(variance + mean * mean)
        columns = (mean, np.where(std > CONSTANT * rms, std, 0.0), rms, units.mean_abs.exact)
        sides.append(Statistics(*(column.astype(np.float32) for column in columns)))
    return sides[0], sides[1]
