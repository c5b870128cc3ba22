"""Texts joined end to end in rows of one length: next to no padding, and few shapes, whatever the texts.

A row holds several texts, each with positions of its own, and attention sees only the text that a token is of. Batches
of equal shape share compiled programs, also those of different sets of texts.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tmjax import backend
from tmjax.models.decoder import Decoder, ForwardPlan, ForwardResult, TokenContext
from tmjax.models.layers import Sight
from tmjax.models.rotary import rotary_tables
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.mesh import Layout
from tmjax.text.buckets import bucket_length
from tmjax.typing import Array, ArrayLike

#: Rows are at least so many tokens long: texts up to this length all have one shape.
ROW_TOKENS = 128
#: Tokens of a batch on a CPU, whose caches hold the activations of about so many.
CPU_TOKENS = 2048
#: Batches of a row length have one of about so many sizes.
SIZES = 4


class Joined(NamedTuple):
    """A batch of joined texts, arrays [B, T] int32.

    `ids`: tokens of the texts but for their last; `label`: the token that follows each, -1 on padding; `text`: number
    of the text that a token is of, -1 on padding; `place`: the token's position in its text.
    """

    ids: ArrayLike
    label: ArrayLike
    text: ArrayLike
    place: ArrayLike


def joins(spec: DecoderSpec) -> bool:
    """Whether texts may share a row: not where frequencies of rotary embeddings depend on the length of a text."""
    return all(rotary.scaling not in ("dynamic", "longrope") for rotary in spec.rotaries)


def _filled(inputs: Sequence[int], *, join: bool) -> dict[int, list[list[int]]]:
    """Numbers of the texts in every row, by row length; the longest texts open rows, shorter ones fill them."""
    rows: dict[int, list[list[int]]] = {}
    room: list[tuple[int, int, int]] = []  # (tokens left, length of the row, its number), ascending
    for number in sorted(range(len(inputs)), key=lambda number: (-inputs[number], number)):
        position = bisect.bisect_left(room, (inputs[number],))
        if join and position < len(room):
            left, length, row = room.pop(position)
            rows[length][row].append(number)
        else:
            # Alone in its row a text is padded as `bucketed` would, which its frequencies may depend on.
            length = bucket_length(max(ROW_TOKENS, inputs[number])) if join else bucket_length(inputs[number] + 1) - 1
            row, left = len(rows.setdefault(length, [])), length
            rows[length].append([number])
        if join and left > inputs[number]:
            bisect.insort(room, (left - inputs[number], length, row))
    return rows


def join(spec: DecoderSpec, texts: Sequence[Sequence[int]], batch_tokens: int, layout: Layout) -> Iterator[Joined]:
    """Batches of at most about `batch_tokens` tokens that hold all texts (token ids, at least two each)."""
    inputs = [len(ids) - 1 for ids in texts]
    if backend.platform() == "cpu":
        batch_tokens = min(batch_tokens, CPU_TOKENS * layout.batch_multiple)
    for length, rows in sorted(_filled(inputs, join=joins(spec)).items()):
        size = batch_size(len(rows), max(1, batch_tokens // length), layout.batch_multiple)
        for start in range(0, len(rows), size):
            batch = Joined(*(np.full((size, length), fill, np.int32) for fill in (0, -1, -1, 0)))
            for slot, members in enumerate(rows[start : start + size]):
                at = 0
                for number in members:
                    part = slice(at, at + inputs[number])
                    batch.ids[slot, part], batch.label[slot, part] = texts[number][:-1], texts[number][1:]
                    batch.text[slot, part], batch.place[slot, part] = number, np.arange(inputs[number])
                    at = part.stop
            yield batch


def batch_size(rows: int, max_rows: int, multiple: int) -> int:
    """Rows of every batch: evenly filled, one of few sizes, at most `max_rows` before rounding to `multiple`."""
    even = -(-rows // -(-rows // max_rows))
    step = max(1, max_rows // SIZES)
    size = min(max_rows, -(-even // step) * step)
    return -(-size // multiple) * multiple


def run_joined(model: Decoder, batch: Joined, plan: ForwardPlan) -> ForwardResult:
    """Runs the decoder over joined texts: states and activations are those of `Decoder.run` on each text alone."""
    spec, index = model.spec, jnp.arange(batch.ids.shape[1])
    distance = index[:, None] - index
    same = (batch.text[:, :, None] == batch.text[:, None, :])[:, None, None]
    cos, sin = (table[:, batch.place] for table in rotary_tables(spec.rotaries, spec.head_dim, index))

    def mask(window: Array) -> Sight:
        sight = Sight.within(window, distance, batch.place[:, None, None])
        return sight._replace(mask=same & sight.mask)

    return model.run(batch.ids, plan, TokenContext(batch.place, (cos, sin), mask))
