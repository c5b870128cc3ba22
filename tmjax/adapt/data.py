"""Documents into batches of few fixed shapes: one document per row, so that a program is compiled once per row length.

A row holds one document from position 0, as it is scored, and nothing attends across documents. Padding stays small
because the row lengths are chosen for the documents at hand.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tmjax.errors import InputError
from tmjax.typing import ArrayLike

#: Row lengths are multiples of this.
ROW_STEP = 8


class Batch(NamedTuple):
    """Inputs [B, T], the token that follows each, and 1 where that token counts (0 on padding)."""

    ids_bt: ArrayLike
    targets_bt: ArrayLike
    mask_bt: ArrayLike


def split(documents: Sequence[Sequence[int]], max_tokens: int) -> list[np.ndarray]:
    """Cuts documents into pieces that predict at most `max_tokens` tokens each.

    The first token of a piece is only context, and pieces overlap by that token: every token of a document but its
    first is predicted exactly once.
    """
    pieces = []
    for document in documents:
        ids = np.asarray(document, np.int32)
        pieces += [ids[start : start + max_tokens + 1] for start in range(0, len(ids) - 1, max_tokens)]
    return pieces


def row_lengths(sizes: Sequence[int], count: int) -> list[int]:
    """At most `count` row lengths, multiples of `ROW_STEP`, that hold rows of these sizes with the least padding."""
    ceilings, frequency = np.unique(-(-np.asarray(sizes) // ROW_STEP) * ROW_STEP, return_counts=True)
    upto = np.concatenate([[0], np.cumsum(frequency)])
    best = np.where(upto > 0, np.inf, 0.0)  # padded tokens of the rows that fit the first j ceilings
    chosen: list[list[int]] = [[] for _ in upto]
    for _ in range(count):
        cost = best[:, None] + (upto[None, :] - upto[:, None]) * np.concatenate([[0], ceilings])[None, :]
        cost[np.tril_indices(len(upto), -1)] = np.inf
        origin = cost.argmin(axis=0)
        chosen = [[*chosen[i], int(ceilings[j - 1])] if i < j else chosen[i] for j, i in enumerate(origin)]
        best = cost.min(axis=0)
    return chosen[-1]


def make_batch(rows: Sequence[np.ndarray], length: int) -> Batch:
    """Right-pads documents of at most `length + 1` tokens into one batch."""
    ids = np.zeros((len(rows), length + 1), np.int32)
    mask = np.zeros((len(rows), length), np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row) - 1] = 1.0
    return Batch(ids[:, :-1], ids[:, 1:], mask)


def batches(
    documents: Sequence[Sequence[int]], *, tokens: int, seed: int, lengths: int = 4, max_tokens: int = 512
) -> Iterator[Batch]:
    """Endless batches of at most `tokens` tokens (padding included) in at most `lengths` different shapes.

    Each epoch visits all documents in a new random order; a row length gives a batch whenever it has enough rows for
    one, and rows left over at the end of an epoch open the next. Raises InputError if there is nothing to train on.
    """
    pieces = split(documents, min(max_tokens, tokens))
    if not pieces:
        raise InputError("no document has two tokens; there is nothing to train on")
    sizes = np.array([len(piece) - 1 for piece in pieces])
    shapes = row_lengths(sizes, lengths)
    return _endless(pieces, np.searchsorted(shapes, sizes), shapes, tokens, np.random.default_rng(seed))


def _endless(
    pieces: list[np.ndarray], bucket: np.ndarray, shapes: list[int], tokens: int, rng: np.random.Generator
) -> Iterator[Batch]:
    waiting: list[list[np.ndarray]] = [[] for _ in shapes]
    while True:
        for i in rng.permutation(len(pieces)):
            rows, length = waiting[bucket[i]], shapes[bucket[i]]
            rows.append(pieces[i])
            if len(rows) == max(1, tokens // length):
                yield make_batch(rows, length)
                rows.clear()
