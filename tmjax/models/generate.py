"""Generation of text after prompts: a batch is one program for the prompts and one for the tokens after them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tmjax.errors import InputError
from tmjax.models.cache import Cache, extend, grown, laid_out, step_tables, turning_point
from tmjax.models.decoder import bind, known_logits
from tmjax.models.prompts import Prompts, make_prompts, placed, read_prompts
from tmjax.models.sample import Sampling, choose
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.hosts import to_host
from tmjax.sharding.mesh import Layout
from tmjax.typing import Array, Params, pytree_dataclass

#: Tokens between two looks of the host.
STRETCH = 32
#: Rows below which a batch whose texts have ended is not made smaller: another shape is another program.
LEAST_ROWS = 32
GREEDY = Sampling()


@dataclass(frozen=True)
class DecodingOptions:
    """Settings of decoding; equal sizes share compiled programs.

    Attributes:
        new_tokens: Largest number of tokens after a prompt.
        ends: Tokens that end a text; they are not part of it.
        known: Rows of the embedding that are tokens, bool [vocab]; no others are generated. None: all.
        sampling: Choice of the next token.
        seed: Seed of all draws.
        prompt_tokens: Prompts are padded to a multiple of so many tokens; None: to the longest.
        rows: The batch is padded to so many prompts; None: to their number.
        dtype: Dtype of the computation.
    """

    new_tokens: int
    ends: Sequence[int] = ()
    known: np.ndarray | None = None
    sampling: Sampling = GREEDY
    seed: int = 0
    prompt_tokens: int | None = None
    rows: int | None = None
    dtype: jnp.dtype = jnp.float32


@dataclass(frozen=True)
class DecodingProgram:
    """The static part of both programs; hashable."""

    spec: DecoderSpec
    sampling: Sampling
    dtype: jnp.dtype
    mesh: Mesh | None


@pytree_dataclass
@dataclass(frozen=True)
class DecodingState:
    """A batch during generation: cache, last token [B] (not yet in the cache), whether rows have ended, keys [B]."""

    cache: Cache
    last: Array
    ended: Array
    keys: Array


def _keys_at(keys_b: Array, length_b: Array) -> Array:
    return jax.vmap(jax.random.fold_in)(keys_b, length_b)


@functools.partial(jax.jit, static_argnames="program")
def begin(
    program: DecodingProgram,
    params: Params,
    prompts: Prompts,
    keys_b: Array,
    ends: Array,
    known_v: Array | None,
) -> DecodingState:
    """Reads the prompts and chooses the first token after each."""
    last, cache = read_prompts(program.spec, params, prompts, program.dtype, program.mesh)
    logits = known_logits(bind(program.spec, params).logits(last), known_v)
    token = choose(logits, _keys_at(keys_b, cache.length), program.sampling)
    return DecodingState(cache, token, jnp.isin(token, ends), keys_b)


@functools.partial(jax.jit, static_argnames=("program", "stretch"), donate_argnames=("state",))
def go_on(
    program: DecodingProgram,
    params: Params,
    state: DecodingState,
    tables: tuple[Array, Array],
    ends: Array,
    known_v: Array | None,
    count: Array,
    stretch: int,
) -> tuple[Array, DecodingState]:
    """Up to `count` further tokens, [B, stretch]; it stops early when all rows have ended."""
    model = bind(program.spec, params)
    batch = state.last.shape[0]

    def step(loop: tuple[Array, Array, DecodingState]) -> tuple[Array, Array, DecodingState]:
        number, tokens, now = loop
        at = tuple(table[:, now.cache.length][:, :, None] for table in tables)
        one = jnp.ones(batch, jnp.int32)
        hidden, cache = extend(program.spec, params, now.cache, now.last[:, None], one, at, program.mesh)
        logits = known_logits(model.logits(hidden[:, 0]), known_v)
        token = choose(logits, _keys_at(now.keys, cache.length), program.sampling)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, number))
        return number + 1, tokens, DecodingState(cache, token, now.ended | jnp.isin(token, ends), now.keys)

    def more(loop: tuple[Array, Array, DecodingState]) -> Array:
        number, _, now = loop
        return (number < count) & ~jnp.all(now.ended)

    empty = jnp.zeros((batch, stretch), jnp.int32)
    _, tokens, state = jax.lax.while_loop(more, step, (jnp.int32(0), empty, state))
    return tokens, state


@functools.partial(jax.jit, static_argnames=("slots", "mesh"))
def with_room(state: DecodingState, slots: int, mesh: Mesh | None) -> DecodingState:
    """The batch with `slots` further slots in its cache."""
    return dataclasses.replace(state, cache=laid_out(grown(state.cache, slots), mesh))


@functools.partial(jax.jit, static_argnames=("mesh",))
def _rows(state: DecodingState, rows: Array, mesh: Mesh | None) -> DecodingState:
    """Only these rows of a batch."""
    return DecodingState(state.cache.of_rows(rows, mesh), state.last[rows], state.ended[rows], state.keys[rows])


def cache_bytes(spec: DecoderSpec, tokens: int, dtype: jnp.dtype) -> int:
    """Bytes of the keys and values of one text of so many tokens."""
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * tokens * jnp.dtype(dtype).itemsize


def generate(
    spec: DecoderSpec,
    params: Params,
    prompts: Sequence[Sequence[int]],
    options: DecodingOptions,
    *,
    numbers: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    layout: Layout | None = None,
    finished: Callable[[int, list[int]], bool] = lambda row, ids: False,
) -> list[list[int]]:
    """Generates at most `options.new_tokens` tokens after each prompt.

    A row's draws depend on the seed and its number alone, not on the batch it is in. A batch of which half has ended
    goes on without those rows.

    Args:
        spec: Architecture.
        params: Parameters by Flax path.
        prompts: Token ids of the prompts, at least one each.
        options: Settings of decoding.
        numbers: Numbers of the rows, by default their places.
        groups: The group of every prompt. What all prompts of a group begin with is read once; the result is the same.
        layout: Devices; one unless given.
        finished: Called with a row and its new tokens every `STRETCH` tokens; whether the row ends there.

    Returns:
        The new tokens of every prompt, without the one of `options.ends` that ended it.

    Raises:
        InputError: A prompt is empty, or the model does not read so many tokens.
    """
    lengths, new_tokens = [len(ids) for ids in prompts], options.new_tokens
    if min(lengths) < 1 or new_tokens < 1:
        raise InputError("writing needs prompts of at least one token, and at least one new token")
    if spec.bound and max(lengths) + new_tokens > spec.max_positions:
        raise InputError(
            f"prompts of {max(lengths)} tokens and {new_tokens} new ones are too many: {spec.bound}; ask for fewer"
        )
    batch = _Batch(spec, params, options, layout or Layout(), finished)
    numbers = list(range(len(prompts)) if numbers is None else numbers)
    turn = turning_point(spec)
    limits = [turn + 1 - n if n <= turn < n + new_tokens - 1 else new_tokens for n in lengths]
    result = batch.generate(prompts, numbers, limits, [[] for _ in prompts], groups=groups)
    again = [row for row, (ids, n) in enumerate(zip(result, limits, strict=True)) if len(ids) == n < new_tokens]
    if again:  # all frequencies change here, so keys and values are made anew
        further = batch.generate(
            [[*prompts[row], *result[row]] for row in again],
            [numbers[row] for row in again],
            [new_tokens - limits[row] for row in again],
            [result[row] for row in again],
            again,
        )
        for row, ids in zip(again, further, strict=True):
            result[row] = result[row] + ids
    return result


@dataclass(frozen=True)
class _Batch:
    """The settings that all rows of a batch share."""

    spec: DecoderSpec
    params: Params
    options: DecodingOptions
    layout: Layout
    finished: Callable[[int, list[int]], bool]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        limits: Sequence[int],
        before: Sequence[list[int]],
        names: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """At most `limits` tokens after each prompt; `finished` gets row `names` with those generated `before`."""
        options, multiple = self.options, self.layout.batch_multiple
        size = -(-max(options.rows or 0, len(prompts)) // multiple) * multiple
        tokens = options.prompt_tokens or max(map(len, prompts))
        laid = make_prompts(self.spec, prompts, groups, size=size, tokens=tokens, multiple=multiple)
        number = np.zeros(size, np.uint32)
        number[: len(prompts)] = numbers
        result: list[list[int]] = [[] for _ in prompts]
        is_open = np.arange(size) < len(prompts)
        for rows, tokens in self._stretches(laid, number, max(limits), is_open):
            for place, row in enumerate(rows.tolist()):
                if not is_open[row]:
                    continue
                generated = result[row]
                ended = False
                for token in tokens[place].tolist():
                    ended = token in options.ends or len(generated) == limits[row]
                    if ended:
                        break
                    generated.append(token)
                name = row if names is None else names[row]
                is_open[row] = not (ended or self.finished(name, before[row] + generated))
        return result

    def _stretches(
        self,
        prompts: Prompts,
        number_b: np.ndarray,
        new_tokens: int,
        is_open: np.ndarray,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens [R, n] of rows [R] as they are generated, by stretches, until there are enough or none `is_open`.

        The cache begins with room for one stretch, and there is twice as much room whenever it is full.
        """
        spec, mesh, place = self.spec, self.layout.mesh, self.layout.place_batch
        known, program = (
            self.options.known,
            DecodingProgram(spec, self.options.sampling, jnp.dtype(self.options.dtype), mesh),
        )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.options.seed), number_b)
        ends = jnp.asarray(list(self.options.ends) or [-1], jnp.int32)
        state = begin(program, self.params, placed(prompts, place), keys, ends, known)
        batch, prompt = len(number_b), prompts.slots
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
                state, room, stretches = with_room(state, fresh * STRETCH, mesh), fresh, stretches - fresh
            state = DecodingState(state.cache, state.last, place(~is_open[rows]), state.keys)
            now = min(STRETCH, left)
            tokens, state = go_on(program, self.params, state, tables, ends, known, jnp.int32(now), STRETCH)
            left, room = left - now, room - 1
            yield rows, to_host(tokens)[:, :now]

    def _kept(self, is_open: np.ndarray) -> np.ndarray:
        """The rows to go on with: all, or half of them (a quarter, ...) if the others have ended."""
        size = len(is_open)
        while size // 2 >= max(LEAST_ROWS, is_open.sum()) and size % (2 * self.layout.batch_multiple) == 0:
            size //= 2
        return np.sort(np.argsort(~is_open, kind="stable")[:size])
