"""Programs that merges and adaptations share: capture, generation, teacher probabilities, scoring."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.activations.capture import CaptureOptions, pooled_forward
from tmjax.activations.joined import Joined, join
from tmjax.commands.doctor.side import Side
from tmjax.commands.plan.planned import Entry, Placement, Planned
from tmjax.evaluate.bits import token_nll
from tmjax.models.cache import step_tables
from tmjax.models.generate import STRETCH, DecodingProgram, begin, go_on, with_room
from tmjax.models.prompts import PROMPT_TOKENS, make_prompts, placed
from tmjax.models.tree import Nodes
from tmjax.teacher.branches import NODE_ROWS, ROW_NODES, STATES, likeliest_after, read_batch, read_branches
from tmjax.teacher.generation import SHARE_LINES, Generation, batch_rows
from tmjax.teacher.probabilities import BATCH_TOKENS, Search
from tmjax.text.buckets import bucket_length, bucketed
from tmjax.text.rows import TokenisedDocument

#: Assumed nodes per position that the search for probabilities reads.
NODES_PER_POSITION = 1.0
#: Most tokens of a prompt of three words.
OPENING_TOKENS = 8


def joined_of(count: int, tokens: int, side: Side, batch_tokens: int, place: Placement) -> tuple[Joined, int]:
    """Returns the shapes of the largest batch of `count` joined texts of `tokens` tokens, and the number of batches."""
    texts = [[0] * max(2, tokens)] * max(1, count)
    batches = list(join(side.spec, texts, batch_tokens, place.layout))
    widest = max(batches, key=lambda batch: batch.ids.size)
    return Joined(*(place.batch(np.shape(x), jnp.int32) for x in widest)), len(batches)


@dataclass(frozen=True)
class SourcePrograms:
    """Makes the programs of one run.

    Attributes:
        place: Devices.
        dtype: Dtype of forward passes.
        live: Arrays that are on the devices from beginning to end.
    """

    place: Placement
    dtype: jnp.dtype
    live: dict[str, Any]

    def others(self, name: str) -> dict[str, Any]:
        """What stays live beside the parameters of a model."""
        return {key: value for key, value in self.live.items() if key != name}

    def capture(self, name: str, side: Side, texts: int, tokens: int, rows: int, options: CaptureOptions) -> Planned:
        """Activations of a model at `rows` rows of every text."""
        documents = [TokenisedDocument([0] * tokens, [(0,)] * rows)]
        sites = tuple(side.spec.sites if options.sites is None else options.sites)
        limit = options.batch_limit(side.spec, sites, documents)
        batches = list(bucketed([tokens] * texts, batch_tokens=limit, multiple=self.place.layout.batch_multiple))
        size, length = batches[0].size, batches[0].tokens
        arguments = (
            side.spec,
            self.live[name],
            self.place.batch((size, length), jnp.int32),
            self.place.batch((size, rows, length), jnp.float32),
            sites,
            jnp.dtype(self.dtype),
            self.place.layout.mesh,
            options.layers,
        )
        settings = {"activations.batch_tokens": size * length}
        return Planned(pooled_forward, arguments, len(batches), self.others(name), settings=settings)

    def scoring(self, params: Any, side: Side, texts: tuple[int, int], batch_tokens: int, live: Any) -> Planned:
        """Log-likelihoods of texts (number, tokens) under a model."""
        batch, count = joined_of(*texts, side, batch_tokens, self.place)
        arguments = side.spec, params, batch, jnp.dtype(self.dtype), self.place.layout.mesh
        settings = {"evaluation.batch_tokens": batch.ids.size}
        return Planned(token_nll, arguments, count, live, settings=settings)

    def generation(self, name: str, side: Side, generation: Generation, tokens: int) -> Iterator[Entry]:
        """Prompts and further tokens of generated texts; `tokens` are those of a given text before a prompt."""
        lines = generation.examples * tokens
        longest = 1 + OPENING_TOKENS + lines + generation.tokens
        rows = min(batch_rows(side.spec, generation, longest, self.dtype), generation.texts)
        layout, spec, array = self.place.layout, side.spec, self.place.array
        rows = min(bucket_length(rows), generation.batch)
        rows = -(-rows // layout.batch_multiple) * layout.batch_multiple
        batches = -(-generation.texts // rows)
        program = DecodingProgram(spec, generation.sampling, jnp.dtype(self.dtype), layout.mesh)
        keys = array((rows,), jax.random.key(0).dtype)
        ends, known = array((1,), jnp.int32), array((spec.vocab,), bool)
        settings = {"texts generated together": rows}

        def prompts() -> tuple[Any, ...]:
            # Rows stand for texts; their lengths decide the shapes, their tokens do not.
            groups = [number // SHARE_LINES for number in range(rows)] if lines else None
            each = [range(1 + lines + OPENING_TOKENS)] * rows
            laid = make_prompts(spec, each, groups, size=rows, tokens=PROMPT_TOKENS, multiple=layout.batch_multiple)
            shapes = placed(laid, lambda x: self.place.batch(x.shape, x.dtype), self.place.like)
            return program, self.live[name], shapes, keys, ends, known

        def first() -> Planned:
            return Planned(begin, prompts(), batches, self.others(name), settings=settings)

        def further() -> Planned:
            stretches = -(-generation.tokens // STRETCH)
            state = jax.eval_shape(lambda *rest: begin(program, *rest), *prompts()[1:])
            state = jax.eval_shape(lambda now: with_room(now, stretches * STRETCH, None), state)
            cache = state.cache

            def cached(x: Any) -> Any:
                return self.place.batch(x.shape, x.dtype, axis=1)

            cache = type(cache)(
                cached(cache.keys),
                cached(cache.values),
                self.place.batch(cache.positions.shape, cache.positions.dtype),
                array((), jnp.int32),
                self.place.batch(cache.length.shape, cache.length.dtype),
            )
            last, ended = self.place.batch((rows,), jnp.int32), self.place.batch((rows,), bool)
            state = type(state)(cache, last, ended, keys)
            tables = self.place.like(step_tables(spec, cache.keys.shape[3]))
            count = array((), jnp.int32)
            arguments = program, self.live[name], state, tables, ends, known, count, STRETCH
            return Planned(go_on, arguments, batches * stretches, self.others(name), STRETCH, settings)

        yield "generation", "prompts", first
        yield "generation", f"{STRETCH} tokens", further

    def probabilities(self, name: str, side: Side, texts: int, tokens: int, search: Search) -> Iterator[Entry]:
        """The source's next tokens after texts and after continuations of them."""
        layout, spec, dtype = self.place.layout, side.spec, jnp.dtype(self.dtype)
        multiple = layout.batch_multiple
        batches = list(bucketed([tokens] * texts, batch_tokens=BATCH_TOKENS, multiple=multiple))
        size, length = batches[0].size, batches[0].tokens
        params, others, mesh = self.live[name], self.others(name), layout.mesh
        depth, positions = search.steps - 1, texts * tokens

        def up(count: int) -> int:
            return -(-count // multiple) * multiple

        def reading() -> Planned:
            ids, lengths = self.place.batch((size, length), jnp.int32), self.place.batch((size,), jnp.int32)
            return Planned(read_batch, (spec, params, ids, lengths, depth, dtype, mesh), len(batches), others)

        def best() -> Planned:
            states = self.place.batch((up(STATES[0]), spec.hidden), dtype)
            known = self.place.array((spec.vocab,), bool)
            calls = positions * (1 + NODES_PER_POSITION) / up(STATES[0])
            arguments = spec, params, states, known, min(search.candidates, spec.vocab), mesh
            return Planned(likeliest_after, arguments, max(1.0, calls), others)

        def nodes() -> Planned:
            rows, before = up(NODE_ROWS[0]), max(depth - 1, 0)
            shape = (rows, ROW_NODES)
            text = self.place.batch((spec.layers, size, spec.kv_heads, length, spec.head_dim), dtype, axis=1)
            own = self.place.batch((rows, spec.layers, ROW_NODES, before, spec.kv_heads, spec.head_dim), dtype)
            numbers = self.place.batch(shape, jnp.int32)
            node = Nodes(numbers, self.place.batch((rows,), jnp.int32), numbers, numbers, own, own)
            calls = max(1.0, positions * NODES_PER_POSITION / (rows * ROW_NODES))
            return Planned(read_branches, (spec, params, text, text, node, mesh), calls, others)

        yield "teacher probabilities", "texts", reading
        yield "teacher probabilities", "likeliest tokens", best
        if depth:
            yield "teacher probabilities", "continuations", nodes
