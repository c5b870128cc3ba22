"""Products of rows sorted by group with the matrix of their group: only tiles of rows that exist are computed.

TPUs have a product of their own for that, `jax.lax.ragged_dot`. Elsewhere it may be lowered to a masked product of all
rows with all matrices, which costs as many times more as there are groups. There a loop takes a tile of rows at a time;
the number of its turns depends on the data. A tile may reach into the next group, whose own tiles come later and write
those rows again.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tmjax.models.blocks.primitives import precision
from tmjax.typing import Array

#: Rows of a tile: enough for a matrix product to pay, few enough that a group's last tile wastes little.
MIN_TILE, MAX_TILE = 8, 128


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: a power of two, at most a quarter of a group's mean, so that padding is an eighth of the work."""
    quarter = max(1, rows // (4 * groups))
    return min(MAX_TILE, max(MIN_TILE, 1 << (quarter.bit_length() - 1)))


def _dot(left: Array, right: Array, axes: tuple[int, int]) -> Array:
    """Product over one axis of each, accumulated in float32."""
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(
        left, right, numbers, precision=precision(left.dtype), preferred_element_type=jnp.float32
    )


def _tiles(sizes: Array, tile: int) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Number of tiles, and a function from a tile's number to its group, its first row and its number of rows."""
    tiles = -(-sizes // tile)
    last = jnp.cumsum(tiles)
    begin = jnp.cumsum(sizes) - sizes

    def place(number: Array) -> tuple[Array, Array, Array]:
        group = jnp.searchsorted(last, number, side="right").astype(sizes.dtype)
        before = (number - (last[group] - tiles[group])) * tile
        return group, begin[group] + before, jnp.minimum(sizes[group] - before, tile)

    return last[-1], place


@functools.partial(jax.jit, static_argnames="contract")
def grouped_rows(x_ri: Array, w_goi: Array, sizes_g: Array, contract: int) -> Array:
    """Rows times the matrices of their groups, contracted over axis `contract` of the matrices: see `grouped_product`.

    A function of its own name, by which the counting of `tmjax plan` knows it.
    """
    tiled, ragged = (functools.partial(form, contract=contract) for form in (tiled_rows, ragged_rows))
    return jax.lax.platform_dependent(x_ri, w_goi, sizes_g, tpu=ragged, default=tiled)


def ragged_rows(x_ri: Array, w_goi: Array, sizes_g: Array, contract: int) -> Array:
    """`grouped_rows` as the one product that TPUs have."""
    axes = jax.lax.RaggedDotDimensionNumbers((((1,), (contract,)), ((), ())), (0,), (0,))
    out = _ragged(x_ri, w_goi.astype(x_ri.dtype), sizes_g, axes).astype(x_ri.dtype)
    return jnp.where(jnp.arange(len(x_ri))[:, None] < jnp.sum(sizes_g), out, jnp.zeros_like(out))


def ragged_weights(dy_ro: Array, x_ri: Array, sizes_g: Array) -> Array:
    """`grouped_weights` as the one product that TPUs have."""
    axes = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    return _ragged(dy_ro, x_ri, sizes_g, axes)


def _ragged(left: Array, right: Array, sizes_g: Array, axes: jax.lax.RaggedDotDimensionNumbers) -> Array:
    return jax.lax.ragged_dot_general(
        left, right, sizes_g, axes, precision=precision(left.dtype), preferred_element_type=jnp.float32
    )


def tiled_rows(x_ri: Array, w_goi: Array, sizes_g: Array, contract: int) -> Array:
    """`grouped_rows` as a loop over tiles."""
    rows, tile = x_ri.shape[0], tile_rows(x_ri.shape[0], w_goi.shape[0])
    count, place = _tiles(sizes_g, tile)
    padded = jnp.pad(x_ri, ((0, tile), (0, 0)))

    def turn(number: Array, out: Array) -> Array:
        group, start, _ = place(number)
        part = jax.lax.dynamic_slice_in_dim(padded, start, tile)
        made = _dot(part, w_goi[group].astype(x_ri.dtype), (1, contract - 1)).astype(x_ri.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, made, start, 0)

    empty = jnp.zeros((rows + tile, w_goi.shape[3 - contract]), x_ri.dtype)
    out = jax.lax.fori_loop(jnp.zeros_like(count), count, turn, empty)[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < jnp.sum(sizes_g), out, jnp.zeros_like(out))


@jax.jit
def grouped_weights(dy_ro: Array, x_ri: Array, sizes_g: Array) -> Array:
    """Sums over the rows of each group of dy x^T, [group, out, in] in float32: the gradient of the matrices."""
    return jax.lax.platform_dependent(dy_ro, x_ri, sizes_g, tpu=ragged_weights, default=tiled_weights)


def tiled_weights(dy_ro: Array, x_ri: Array, sizes_g: Array) -> Array:
    """`grouped_weights` as a loop over tiles."""
    groups = sizes_g.shape[0]
    tile = tile_rows(x_ri.shape[0], groups)
    count, place = _tiles(sizes_g, tile)
    left, right = (jnp.pad(x, ((0, tile), (0, 0))) for x in (dy_ro, x_ri))

    def turn(number: Array, total: Array) -> Array:
        group, start, own = place(number)
        parts = [jax.lax.dynamic_slice_in_dim(x, start, tile) for x in (left, right)]
        parts[0] = jnp.where(jnp.arange(tile)[:, None] < own, parts[0], jnp.zeros_like(parts[0]))
        return total.at[group].add(_dot(parts[0], parts[1], (0, 0)))

    empty = jnp.zeros((groups, dy_ro.shape[1], x_ri.shape[1]), jnp.float32)
    return jax.lax.fori_loop(jnp.zeros_like(count), count, turn, empty)


@jax.custom_vjp
def grouped_product(x_ri: Array, w_goi: Array, sizes_g: Array) -> Array:
    """Multiplies rows, sorted by group, with the matrix of their group.

    Args:
        x_ri: Rows [rows, in]; the first `sizes_g[0]` belong to group 0, and so on.
        w_goi: Matrices [group, out, in], read in the dtype of the rows.
        sizes_g: Number of rows of each group, int32.

    Returns:
        The products [rows, out] in the dtype of the rows, accumulated in float32; rows beyond all groups are zero.
    """
    return grouped_rows(x_ri, w_goi, sizes_g, contract=2)


def _forward(x_ri: Array, w_goi: Array, sizes_g: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_product(x_ri, w_goi, sizes_g), (x_ri, w_goi, sizes_g)


def _backward(kept: tuple[Array, Array, Array], dy_ro: Array) -> tuple[Array, Array, None]:
    x_ri, w_goi, sizes_g = kept
    slope = grouped_weights(dy_ro, x_ri, sizes_g).astype(w_goi.dtype)
    return grouped_rows(dy_ro, w_goi, sizes_g, contract=1), slope, None


grouped_product.defvjp(_forward, _backward)
