"""A cache of keys and values: a text is read once and then goes on token by token, in programs of static shape.

Slots of the cache are filled in the order of calls, the same for all rows; which position a slot holds is each row's
own, so prompts of different lengths are padded on the right and nothing is moved. Padding leaves slots nobody reads.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tmjax.models.blocks.primitives import einsum
from tmjax.models.decoder import After, Carried, ForwardPlan, TokenContext, bind
from tmjax.models.layers import Attend, Sight, Weighing
from tmjax.models.rotary import inverse_frequencies
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.mesh import constrain
from tmjax.typing import Array, Params, pytree_dataclass

#: Position of a slot without a token: after every query, so no query sees it.
NOWHERE = 2**30


@pytree_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values [layer, B, kv head, S, head_dim], rotated; positions [B, S] of the tokens in the slots.

    `used` slots are filled; `length` [B] is the number of tokens of each row, which is the next one's position.
    """

    keys: Array
    values: Array
    positions: Array
    used: Array
    length: Array

    def of_rows(self, rows: Array, mesh: Mesh | None) -> "Cache":
        """Returns the cache of these rows, each any number of times; for use inside jit."""
        keys, values = self.keys[:, rows], self.values[:, rows]
        return laid_out(Cache(keys, values, self.positions[rows], self.used, self.length[rows]), mesh)


def laid_out(cache: Cache, mesh: Mesh | None) -> Cache:
    """Returns the cache with its rows split over the devices; for use inside jit."""
    keys, values = (constrain(mesh, x, (None, "batch", None, None, None)) for x in (cache.keys, cache.values))
    return dataclasses.replace(cache, keys=keys, values=values)


def empty_cache(spec: DecoderSpec, batch: int, slots: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """A cache of `slots` tokens a row, none of them filled."""
    empty = jnp.zeros((spec.layers, batch, spec.kv_heads, slots, spec.head_dim), dtype)
    positions = jnp.full((batch, slots), NOWHERE, jnp.int32)
    return Cache(empty, empty, positions, jnp.int32(0), jnp.zeros(batch, jnp.int32))


def grown(cache: Cache, slots: int) -> Cache:
    """The cache with `slots` further slots, none of them filled."""
    wide = ((0, 0), (0, 0), (0, 0), (0, slots), (0, 0))
    positions = jnp.pad(cache.positions, ((0, 0), (0, slots)), constant_values=NOWHERE)
    return Cache(jnp.pad(cache.keys, wide), jnp.pad(cache.values, wide), positions, cache.used, cache.length)


def read_after(
    spec: DecoderSpec,
    params: Params,
    cache: Cache,
    ids_bt: Array,
    count_b: Array,
    tables: tuple[Array, Array],
    mesh: Mesh | None = None,
) -> tuple[Array, Cache]:
    """Reads the first `count_b` tokens of each row of `ids_bt` after those in the cache; for use inside jit.

    `tables` are cosines and sines [rotary, B, T, planes] (or [rotary, 1, T, planes]) at the new tokens' positions.
    Returns the final normed states [B, T, embed] and a cache of the new tokens alone.
    """
    slots, new = cache.positions.shape[1], ids_bt.shape[1]
    place = cache.length[:, None] + jnp.arange(new)
    fresh = jnp.where(jnp.arange(new) < count_b[:, None], place, NOWHERE)
    distance = place[:, :, None] - jnp.concatenate([cache.positions, fresh], axis=1)[:, None, :]

    def mask(window: Array) -> Sight:
        return Sight.within(window, distance[:, None, None], place[:, None, None])

    def enter(carried: Carried, layer: Array) -> tuple[Attend, After]:
        after = [carried]

        def attend(q: Array, k: Array, v: Array, sight: Sight, weighing: Weighing) -> Array:
            made = tuple(jnp.swapaxes(x, 1, 2) for x in (k, v))
            after[:] = [tuple(x.at[layer].set(one) for x, one in zip(carried, made, strict=True))]
            blocks = [(cache.keys[layer], cache.values[layer]), made] if slots else [made]
            return _attention(q, blocks, sight, weighing)

        return attend, lambda: after[0]

    # What was read before is only read here, and written to by the caller once: a loop that handed it on from layer to
    # layer would copy all of it for every token.
    made = jnp.zeros((spec.layers, len(ids_bt), spec.kv_heads, new, spec.head_dim), cache.keys.dtype)
    carried = tuple(constrain(mesh, x, (None, "batch", None, None, None)) for x in (made, made))
    model = bind(spec, params)
    context = TokenContext(place, tables, mask, enter, carried)
    hidden, _, (keys, values) = model.run(ids_bt, ForwardPlan(made.dtype, mesh=mesh), context)
    return hidden, Cache(keys, values, fresh, jnp.int32(new), cache.length + count_b)


def extend(
    spec: DecoderSpec,
    params: Params,
    cache: Cache,
    ids_bt: Array,
    count_b: Array,
    tables: tuple[Array, Array],
    mesh: Mesh | None = None,
) -> tuple[Array, Cache]:
    """`read_after` that returns the cache with the new tokens in it; there must be T free slots."""
    hidden, new = read_after(spec, params, cache, ids_bt, count_b, tables, mesh)
    place = (0, 0, 0, cache.used, 0)
    keys, values = (
        jax.lax.dynamic_update_slice(old, made, place)
        for old, made in ((cache.keys, new.keys), (cache.values, new.values))
    )
    known = jax.lax.dynamic_update_slice(cache.positions, new.positions, (0, cache.used))
    return hidden, Cache(keys, values, known, cache.used + new.used, new.length)


def _attention(q_bthd: Array, blocks: Sequence[tuple[Array, Array]], sight: Sight, weighing: Weighing) -> Array:
    """`layers.attention` with keys and values laid out by head, [B, kv head, S, head_dim], in blocks of slots."""
    batch, tokens, heads, dim = q_bthd.shape
    grouped = q_bthd.reshape(batch, tokens, blocks[0][0].shape[1], -1, dim)
    products = jnp.concatenate([einsum("btkgd,bksd->bkgts", grouped, keys) for keys, _ in blocks], axis=-1)
    # Finite, unlike -inf: every key of padding may be masked, and its NaN would reach others as 0 x NaN.
    weights = weighing.weights(products, sight, jnp.finfo(jnp.float32).min).astype(q_bthd.dtype)
    mixed, first = 0, 0
    for keys, values in blocks:
        part = weights[..., first : first + keys.shape[2]]
        mixed, first = mixed + einsum("bkgts,bksd->btkgd", part, values), first + keys.shape[2]
    return mixed.reshape(batch, tokens, heads * dim)


def stretches(spec: DecoderSpec) -> bool:
    """Whether rotary frequencies depend on how long a run has become."""
    return any(rotary.scaling in ("dynamic", "longrope") for rotary in spec.rotaries)


def turning_point(spec: DecoderSpec) -> int:
    """Tokens of a run after which all of its frequencies change, so that a cache has to be made anew.

    `longrope` asks for that; `dynamic` turns new tokens faster and leaves the old ones, as transformers does.
    """
    return min((r.original_positions for r in spec.rotaries if r.scaling == "longrope"), default=NOWHERE)


def prompt_tables(spec: DecoderSpec, lengths: Sequence[int], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines for prompts padded to `tokens`: [rotary, B, tokens, planes], or [rotary, 1, ...] for all rows.

    Frequencies that stretch are those of each prompt's own length.
    """
    runs = lengths if stretches(spec) else [tokens]
    by_run = {run: _tables(spec, [run] * tokens) for run in set(runs)}
    return _stacked([by_run[run] for run in runs])


def step_tables(spec: DecoderSpec, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [rotary, tokens, planes] of tokens read one by one: each is the last of a run when it is."""
    return _tables(spec, range(1, tokens + 1) if stretches(spec) else [tokens] * tokens)


def _tables(spec: DecoderSpec, runs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """`rotary_tables` on the host, where the token at position i is in a run of `runs[i]` tokens."""
    by_run = {run: np.stack([inverse_frequencies(r, spec.head_dim, run) for r in spec.rotaries]) for run in set(runs)}
    frequencies = np.stack([by_run[run] for run in runs], axis=1)
    angles = np.arange(len(runs), dtype=np.float32)[:, None] * frequencies
    factors = np.asarray([rotary.attention_factor for rotary in spec.rotaries], np.float32)[:, None, None]
    return np.cos(angles) * factors, np.sin(angles) * factors


def _stacked(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = (np.stack(tables, axis=1) for tables in zip(*pairs, strict=True))
    return cos, sin
