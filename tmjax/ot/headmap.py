"""Linear maps between units that lie in heads: pairs of heads, and a small map for each."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tmjax.ot.plan import Plan
from tmjax.typing import Array, ArrayLike, pytree_dataclass


@pytree_dataclass
@dataclass(frozen=True)
class HeadMap(Plan):
    """Maps x ~ to_target y and y ~ to_source x between real units, not standardised ones, in blocks of heads.

    Pair e of E maps head `source_heads[e]` of d' units to head `target_heads[e]` of d units: blocks `to_target`
    [..., E, d, d'] and `to_source` [..., E, d', d]; the blocks of one head add up. `target_pairs` [..., H] and
    `source_pairs` [..., H'] count the pairs of every head. There are no marginals.
    """

    target_heads: ArrayLike
    source_heads: ArrayLike
    to_target: ArrayLike
    to_source: ArrayLike
    target_pairs: ArrayLike
    source_pairs: ArrayLike

    def _dense(self, rows: ArrayLike, columns: ArrayLike, blocks: ArrayLike, heads: tuple[int, int]) -> Array:
        into, out = (jax.nn.one_hot(x, size) for x, size in zip((rows, columns), heads, strict=True))
        dense = jnp.einsum("...eh,...eg,...eij->...higj", into, out, jnp.asarray(blocks), precision="highest")
        return dense.reshape(*dense.shape[:-4], heads[0] * dense.shape[-3], heads[1] * dense.shape[-1])

    @property
    def _heads(self) -> tuple[int, int]:
        return jnp.shape(self.target_pairs)[-1], jnp.shape(self.source_pairs)[-1]

    def matrix(self) -> Array:
        """The map [..., n, k] to the target."""
        return self._dense(self.target_heads, self.source_heads, self.to_target, self._heads)

    def apply(self, x: Array) -> Array:
        """to_target x for x [k, d] of one problem, block by block."""
        if jnp.ndim(self.target_heads) > 1:
            return super().apply(x)
        return _apply(self.target_heads, self.source_heads, self.to_target, self._heads[0], x)

    def apply_transpose(self, x: Array) -> Array:
        """to_source x for x [n, d] of one problem."""
        if jnp.ndim(self.target_heads) > 1:
            back = self._dense(self.source_heads, self.target_heads, self.to_source, self._heads[::-1])
            return jnp.matmul(back, x, precision="highest")
        return _apply(self.source_heads, self.target_heads, self.to_source, self._heads[1], x)

    def reversed(self) -> "HeadMap":
        """The maps exchanged and transposed: its `apply` is to_source^T x."""
        to_target, to_source = (jnp.swapaxes(jnp.asarray(x), -1, -2) for x in (self.to_source, self.to_target))
        return HeadMap(self.target_heads, self.source_heads, to_target, to_source, self.target_pairs, self.source_pairs)


def _apply(rows: ArrayLike, columns: ArrayLike, blocks: ArrayLike, heads: int, x: Array) -> Array:
    blocks = jnp.asarray(blocks)
    split = x.reshape(-1, blocks.shape[-1], x.shape[-1])[jnp.asarray(columns)]
    moved = jnp.einsum("eij,ejc->eic", blocks, split, precision="highest")
    total = jnp.zeros((heads, *moved.shape[1:]), moved.dtype).at[jnp.asarray(rows)].add(moved)
    return total.reshape(-1, x.shape[-1])
