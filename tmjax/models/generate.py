"""Texts that a model writes after prompts: a batch is one program for the prompts and one for the tokens after them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tmjax.errors import InputError
from tmjax.models.cache import Cache, empty_cache, extend, grown, prompt_tables, read_after, step_tables, turning_point
from tmjax.models.decoder import bind, known_logits
from tmjax.models.sample import Sampling, choose
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.hosts import to_host
from tmjax.sharding.mesh import Layout, constrain
from tmjax.typing import Array, Params, pytree_dataclass

#: Tokens between two looks of the host.
STRETCH = 32
#: Rows below which a batch whose texts have ended is not made smaller: another shape is another program.
LEAST_ROWS = 32
GREEDY = Sampling()


@pytree_dataclass
@dataclass(frozen=True)
class Writing:
    """A batch while it is written: cache, last token [B] (not yet in the cache), whether rows have ended, keys [B]."""

    cache: Cache
    last: Array
    ended: Array
    keys: Array


def _keys_at(keys_b: Array, length_b: Array) -> Array:
    return jax.vmap(jax.random.fold_in)(keys_b, length_b)


@functools.partial(jax.jit, static_argnames=("spec", "sampling", "dtype", "mesh"))
def _begin(
    spec: DecoderSpec,
    params: Params,
    ids_bt: Array,
    length_b: Array,
    tables: tuple[Array, Array],
    keys_b: Array,
    ends: Array,
    known_v: Array | None,
    sampling: Sampling,
    dtype: jnp.dtype,
    mesh: Mesh | None,
) -> Writing:
    """Reads the prompts and chooses the first token after each."""
    cache = empty_cache(spec, ids_bt.shape[0], 0, dtype)
    hidden, cache = read_after(spec, params, cache, ids_bt, length_b, tables, mesh)
    last = jnp.take_along_axis(hidden, (length_b - 1)[:, None, None], axis=1)[:, 0]
    logits = known_logits(bind(spec, params).logits(last), known_v)
    token = choose(logits, _keys_at(keys_b, length_b), sampling)
    return Writing(cache, token, jnp.isin(token, ends), keys_b)


@functools.partial(jax.jit, static_argnames=("spec", "stretch", "sampling", "mesh"), donate_argnames=("writing",))
def _go_on(
    spec: DecoderSpec,
    params: Params,
    writing: Writing,
    tables: tuple[Array, Array],
    ends: Array,
    known_v: Array | None,
    most: Array,
    stretch: int,
    sampling: Sampling,
    mesh: Mesh | None,
) -> tuple[Array, Writing]:
    """Up to `most` further tokens, [B, stretch]; it stops early when all rows have ended."""
    model = bind(spec, params)
    batch = writing.last.shape[0]

    def step(state: tuple[Array, Array, Writing]) -> tuple[Array, Array, Writing]:
        number, written, now = state
        at = tuple(table[:, now.cache.length][:, :, None] for table in tables)
        one = jnp.ones(batch, jnp.int32)
        hidden, cache = extend(spec, params, now.cache, now.last[:, None], one, at, mesh)
        logits = known_logits(model.logits(hidden[:, 0]), known_v)
        token = choose(logits, _keys_at(now.keys, cache.length), sampling)
        written = jax.lax.dynamic_update_slice(written, token[:, None], (0, number))
        return number + 1, written, Writing(cache, token, now.ended | jnp.isin(token, ends), now.keys)

    def more(state: tuple[Array, Array, Writing]) -> Array:
        number, _, now = state
        return (number < most) & ~jnp.all(now.ended)

    empty = jnp.zeros((batch, stretch), jnp.int32)
    _, written, writing = jax.lax.while_loop(more, step, (jnp.int32(0), empty, writing))
    return written, writing


@functools.partial(jax.jit, static_argnames=("slots", "mesh"))
def _grown(writing: Writing, slots: int, mesh: Mesh | None) -> Writing:
    return dataclasses.replace(writing, cache=_laid_out(grown(writing.cache, slots), mesh))


@functools.partial(jax.jit, static_argnames=("mesh",))
def _rows(writing: Writing, rows: Array, mesh: Mesh | None) -> Writing:
    """Only these rows of a batch."""
    cache = writing.cache
    held = Cache(cache.keys[:, rows], cache.values[:, rows], cache.positions[rows], cache.used, cache.length[rows])
    return Writing(_laid_out(held, mesh), writing.last[rows], writing.ended[rows], writing.keys[rows])


def _laid_out(cache: Cache, mesh: Mesh | None) -> Cache:
    keys, values = (constrain(mesh, x, (None, "batch", None, None, None)) for x in (cache.keys, cache.values))
    return dataclasses.replace(cache, keys=keys, values=values)


def cache_bytes(spec: DecoderSpec, tokens: int, dtype: jnp.dtype) -> int:
    """Bytes of the keys and values of one text of so many tokens."""
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * tokens * jnp.dtype(dtype).itemsize


def write(
    spec: DecoderSpec,
    params: Params,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    ends: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    prompt_tokens: int | None = None,
    rows: int | None = None,
    known: np.ndarray | None = None,
    dtype: jnp.dtype = jnp.float32,
    layout: Layout | None = None,
    finished: Callable[[int, list[int]], bool] = lambda row, ids: False,
) -> list[list[int]]:
    """At most `new_tokens` tokens after each prompt (token ids, at least one), without the one of `ends` that ended it.

    A row's draws depend on `seed` and its number (`numbers`, by default its place) alone, not on the batch it is in.
    Prompts are padded to `prompt_tokens`, the batch to `rows`: equal sizes share programs. Only `known` rows of the
    embedding [vocab] bool are written, where some are no tokens. Every `STRETCH` tokens
    `finished(row, tokens so far)` may end a row, and a batch of which half has ended goes on without those rows. Raises
    InputError if a model with learned positions has too few.
    """
    lengths = [len(ids) for ids in prompts]
    if min(lengths) < 1 or new_tokens < 1:
        raise InputError("writing needs prompts of at least one token, and at least one new token")
    if spec.learned_positions and max(lengths) + new_tokens > spec.max_positions:
        raise InputError(
            f"prompts of {max(lengths)} tokens and {new_tokens} new ones are more than the {spec.max_positions}"
            " positions that the model learned; ask for fewer"
        )
    batch = _Batch(spec, params, ends, sampling, seed, prompt_tokens, rows, known, dtype, layout or Layout(), finished)
    told = list(range(len(prompts)) if numbers is None else numbers)
    turn = turning_point(spec)
    most = [turn + 1 - n if n <= turn < n + new_tokens - 1 else new_tokens for n in lengths]
    result = batch.write(prompts, told, max(most), most, [[] for _ in prompts])
    again = [row for row, (ids, n) in enumerate(zip(result, most, strict=True)) if len(ids) == n < new_tokens]
    if again:  # all frequencies change here, so keys and values are made anew
        further = batch.write(
            [[*prompts[row], *result[row]] for row in again],
            [told[row] for row in again],
            max(new_tokens - most[row] for row in again),
            [new_tokens - most[row] for row in again],
            [result[row] for row in again],
            again,
        )
        for row, ids in zip(again, further, strict=True):
            result[row] = result[row] + ids
    return result


@dataclass(frozen=True)
class _Batch:
    """What all rows of a batch share."""

    spec: DecoderSpec
    params: Params
    ends: Sequence[int]
    sampling: Sampling
    seed: int
    prompt_tokens: int | None
    rows: int | None
    known: np.ndarray | None
    dtype: jnp.dtype
    layout: Layout
    finished: Callable[[int, list[int]], bool]

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        new_tokens: int,
        most: Sequence[int],
        before: Sequence[list[int]],
        names: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """At most `most` tokens after each prompt; `finished` hears of row `names`, with those written `before`."""
        lengths = [len(ids) for ids in prompts]
        padded = max(self.prompt_tokens or 0, *lengths)
        multiple = self.layout.batch_multiple
        size = -(-max(self.rows or 0, len(prompts)) // multiple) * multiple
        filled = np.ones(size, np.int32)
        filled[: len(prompts)] = lengths
        ids_bt = np.zeros((size, padded), np.int32)
        for row, ids in enumerate(prompts):
            ids_bt[row, : len(ids)] = ids
        number = np.zeros(size, np.uint32)
        number[: len(prompts)] = numbers
        result: list[list[int]] = [[] for _ in prompts]
        is_open = np.arange(size) < len(prompts)
        for rows, written in self._stretches(ids_bt, filled, number, new_tokens, is_open):
            for place, row in enumerate(rows.tolist()):
                if not is_open[row]:
                    continue
                held = result[row]
                ended = False
                for token in written[place].tolist():
                    ended = token in self.ends or len(held) == most[row]
                    if ended:
                        break
                    held.append(token)
                name = row if names is None else names[row]
                is_open[row] = not (ended or self.finished(name, before[row] + held))
        return result

    def _stretches(
        self,
        ids_bt: np.ndarray,
        length_b: np.ndarray,
        number_b: np.ndarray,
        new_tokens: int,
        is_open: np.ndarray,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens [R, n] of rows [R] as they are written, a stretch at a time, until there are enough or none `is_open`.

        The cache begins with room for one stretch, and there is twice as much room whenever it is full.
        """
        spec, mesh, place = self.spec, self.layout.mesh, self.layout.place_batch
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.seed), number_b)
        ends = jnp.asarray(list(self.ends) or [-1], jnp.int32)
        batch, prompt = ids_bt.shape
        tables = prompt_tables(spec, length_b.tolist(), prompt)
        read = (place(ids_bt), place(length_b), tables, keys, ends, self.known)
        state = _begin(spec, self.params, *read, self.sampling, self.dtype, mesh)
        stretches = -(-new_tokens // STRETCH)
        tables = step_tables(spec, prompt + stretches * STRETCH)
        rows, room, left = np.arange(batch), 0, new_tokens - 1
        yield rows, to_host(state.last)[:, None]
        while left > 0 and is_open[rows].any():
            kept = self._kept(is_open[rows])
            if len(kept) < len(rows):
                state, rows = _rows(state, jnp.asarray(kept), mesh), rows[kept]
            if room == 0:
                fresh = min(stretches, max(1, int(state.cache.positions.shape[1] - prompt) // STRETCH + 1))
                state, room, stretches = _grown(state, fresh * STRETCH, mesh), fresh, stretches - fresh
            state = Writing(state.cache, state.last, place(~is_open[rows]), state.keys)
            now = min(STRETCH, left)
            written, state = _go_on(
                spec, self.params, state, tables, ends, self.known, jnp.int32(now), STRETCH, self.sampling, mesh
            )
            left, room = left - now, room - 1
            yield rows, to_host(written)[:, :now]

    def _kept(self, is_open: np.ndarray) -> np.ndarray:
        """The rows to go on with: all, or half of them (a quarter, ...) if the others have ended."""
        size = len(is_open)
        while size // 2 >= max(LEAST_ROWS, is_open.sum()) and size % (2 * self.layout.batch_multiple) == 0:
            size //= 2
        return np.sort(np.argsort(~is_open, kind="stable")[:size])
