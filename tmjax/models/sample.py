"""Choosing the next token: the likeliest, or a draw at a temperature from the likeliest few (Holtzman et al. 2020)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tmjax.errors import InputError
from tmjax.typing import Array

#: Tokens whose weights are summed before a block of them is drawn.
_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the likeliest token; else a draw from softmax(logits / temperature).

    `top_k` keeps the k likeliest tokens, `top_p` of these the fewest that hold the share p; None keeps all. Tokens as
    likely as the last one kept are kept too.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature is {self.temperature}; it is at least 0, which takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it is at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it lies in (0, 1]")


def _least_kept(weights_bv: Array, enough: Array, of: Array) -> Array:
    """The largest value t [B] of the weights with sum(of where weights >= t) >= enough [B].

    Bisection over the bit patterns of non-negative floats, which are ordered as the floats are: 31 sums, no sort.
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        kept = weights_bv >= jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        good = jnp.sum(jnp.where(kept, of, 0), axis=-1) >= enough
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    largest = jax.lax.bitcast_convert_type(jnp.max(weights_bv, axis=-1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(largest), largest + 1))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def kept_weights(logits_bv: Array, sampling: Sampling) -> Array:
    """Unnormalised probabilities [B, V] float32 of a draw: zero for tokens that top-k or top-p leaves out."""
    scaled = logits_bv.astype(jnp.float32) / sampling.temperature
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
    vocab = weights.shape[-1]
    if sampling.top_k is not None and sampling.top_k < vocab:
        threshold = _least_kept(weights, jnp.float32(sampling.top_k), jnp.ones_like(weights))
        weights = jnp.where(weights >= threshold[:, None], weights, 0)
    if sampling.top_p is not None and sampling.top_p < 1:
        threshold = _least_kept(weights, sampling.top_p * jnp.sum(weights, axis=-1), weights)
        weights = jnp.where(weights >= threshold[:, None], weights, 0)
    return weights


def choose(logits_bv: Array, keys_b: Array, sampling: Sampling) -> Array:
    """Next token [B] int32 of every row; `keys_b` are random keys, one a row (not used at temperature 0)."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    weights = kept_weights(logits_bv, sampling)
    # Sums of blocks first, then those within the block that is drawn: a running sum of a whole vocabulary is slow.
    batch, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(batch, -1, _BLOCK)
    until = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    total = until[:, -1]
    # One uniform number a row; rounding must not put it at the total, behind every token.
    drawn = jax.vmap(jax.random.uniform)(keys_b) * total
    drawn = jnp.minimum(drawn, jnp.nextafter(total, jnp.zeros_like(total)))
    block = jnp.sum(until <= drawn[:, None], axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    left = drawn - jnp.take_along_axis(until, block[:, None], axis=1)[:, 0] + jnp.sum(inside, axis=-1)
    # Nor behind the block's last token that can be drawn, since its sum is rounded in another order.
    last = _BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=-1)
    place = jnp.minimum(jnp.sum(jnp.cumsum(inside, axis=-1) <= left[:, None], axis=-1), last)
    return (block * _BLOCK + place).astype(jnp.int32)
