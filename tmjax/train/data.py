"""Documents into batches of few fixed shapes: one document per row, so that a program is compiled once per row length.

A row holds one document from position 0, as it is scored, and nothing attends across documents. Padding stays small
because the row lengths are chosen for the documents at hand.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from tmjax.errors import InputError
from tmjax.teacher.probabilities import TeacherProbabilities
from tmjax.train.loss import TeacherTokens
from tmjax.typing import ArrayLike

#: Row lengths are multiples of this.
ROW_STEP = 8


class Piece(NamedTuple):
    """Token ids of a document from position `start` on, and 1 for those that count, as predictions (not the first)."""

    document: int
    start: int
    ids: np.ndarray
    counts: np.ndarray


class Guide(NamedTuple):
    """Where target features are tied to source features: R spans a row, the last of them padding.

    Positions [B, R] in the row, 1 where there is a span [B, R], standardised source features [L, B, R, k] of each
    target layer.
    """

    position_br: ArrayLike
    mask_br: ArrayLike
    source_lbrk: ArrayLike


class Batch(NamedTuple):
    """Rows of tokens, one document (or piece of one) in each.

    Attributes:
        ids_bt: Inputs [B, T].
        targets_bt: The token that follows each input [B, T].
        mask_bt: 1 where that token counts, 0 on padding and prompts [B, T].
        guide: Source features at spans.
        teacher: A teacher's distributions of the next token.
    """

    ids_bt: ArrayLike
    targets_bt: ArrayLike
    mask_bt: ArrayLike
    guide: Guide | None = None
    teacher: TeacherTokens | None = None


class Guidance(Protocol):
    """Makes the `Guide` of batches."""

    def spans(self, piece: Piece) -> int:
        """Counts the spans of a piece."""

    def guide(self, pieces: Sequence[Piece], rows: int, spans: int) -> Guide:
        """Returns the guide of a batch of `rows` rows, padded to `spans` spans each."""


def teacher_tokens(
    probabilities: TeacherProbabilities, pieces: Sequence[Piece], rows: int, tokens: int
) -> TeacherTokens:
    """Lays out a teacher's probabilities by the positions of a batch.

    Args:
        probabilities: Those of the documents that the pieces are cut from.
        pieces: The first rows of the batch.
        rows: Rows of the batch.
        tokens: Tokens of a row.

    Returns:
        Distributions [rows, tokens, k].
    """
    keep = probabilities.ids.shape[1]
    ids, weight = np.zeros((rows, tokens, keep), np.int32), np.zeros((rows, tokens, keep), np.float32)
    mask = np.zeros((rows, tokens), np.float32)
    for slot, piece in enumerate(pieces):
        low, high = np.searchsorted(probabilities.document, [piece.document, piece.document + 1])
        place = probabilities.position[low:high] - piece.start
        within = (place >= 0) & (place < len(piece.ids) - 1)
        place, number = place[within], np.arange(low, high)[within]
        ids[slot, place], weight[slot, place] = probabilities.ids[number], probabilities.weight[number]
        mask[slot, place] = 1.0
    return TeacherTokens(ids, weight, mask)


def split(
    documents: Sequence[Sequence[int]], max_tokens: int, counts: Sequence[Sequence[bool]] | None = None
) -> list[Piece]:
    """Cuts documents into pieces that predict at most `max_tokens` tokens each.

    The first token of a piece is only context, and pieces overlap by that token: every token of a document but its
    first is predicted exactly once. `counts` says which tokens are to be predicted (all unless given); pieces without
    one are left out.
    """
    pieces = []
    for number, document in enumerate(documents):
        ids = np.asarray(document, np.int32)
        weight = np.ones(len(ids), np.float32) if counts is None else np.asarray(counts[number], np.float32)
        for start in range(0, len(ids) - 1, max_tokens):
            window = slice(start, start + max_tokens + 1)
            if weight[window][1:].any():
                pieces.append(Piece(number, start, ids[window], weight[window]))
    return pieces


def row_lengths(sizes: Sequence[int], count: int) -> list[int]:
    """Returns at most `count` row lengths, multiples of `ROW_STEP`, that fit rows of these sizes with least padding."""
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


def make_batch(pieces: Sequence[Piece], length: int, rows: int | None = None) -> Batch:
    """Right-pads pieces of at most `length + 1` tokens into one batch of `rows` rows (as many as pieces)."""
    ids = np.zeros((rows or len(pieces), length + 1), np.int32)
    mask = np.zeros((rows or len(pieces), length), np.float32)
    for i, piece in enumerate(pieces):
        ids[i, : len(piece.ids)] = piece.ids
        mask[i, : len(piece.ids) - 1] = piece.counts[1:]
    return Batch(ids[:, :-1], ids[:, 1:], mask)


class Batches:
    """Endless batches of at most `tokens` tokens (padding included) in at most `lengths` different shapes.

    Each epoch visits all documents in a new random order, which `seed` alone decides; a row length gives a batch
    whenever it has enough rows for one, and rows left over at the end of an epoch open the next.

    Args:
        documents: Token ids of every document.
        tokens: Most tokens of a batch.
        seed: Seed of the order.
        lengths: Most row lengths.
        max_tokens: Longer documents are cut into pieces that predict at most so many tokens.
        counts: Whether each token of each document is to be predicted; all unless given.
        guidance: Makes the guides of batches.
        teacher: A teacher's probabilities on the documents.
        multiple: The number of rows is a multiple of this (devices that share a batch), filled up with empty rows.

    Raises:
        InputError: There is nothing to train on.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        *,
        tokens: int,
        seed: int,
        lengths: int = 4,
        max_tokens: int = 512,
        counts: Sequence[Sequence[bool]] | None = None,
        guidance: Guidance | None = None,
        teacher: TeacherProbabilities | None = None,
        multiple: int = 1,
    ) -> None:
        self.pieces = split(documents, min(max_tokens, tokens), counts)
        if not self.pieces:
            raise InputError("no document has two tokens of which the second counts; there is nothing to train on")
        self.seed, self.tokens, self.multiple = seed, tokens, multiple
        self.guidance, self.teacher = guidance, teacher
        sizes = np.array([len(piece.ids) - 1 for piece in self.pieces])
        self.shapes = row_lengths(sizes, lengths)
        self._bucket = np.searchsorted(self.shapes, sizes)
        self._spans = [1] * len(self.shapes)
        if guidance is not None:
            for piece, bucket in zip(self.pieces, self._bucket, strict=True):
                self._spans[bucket] = max(self._spans[bucket], guidance.spans(piece))

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the first on."""
        return self.after(0)

    def after(self, count: int) -> Iterator[Batch]:
        """The batches after the first `count`: the same ones as after drawing those."""
        for bucket, chosen in itertools.islice(self._plans(), count, None):
            pieces = [self.pieces[number] for number in chosen]
            rows = -(-self.rows(bucket) // self.multiple) * self.multiple
            batch = make_batch(pieces, self.shapes[bucket], rows)
            if self.guidance is not None:
                batch = batch._replace(guide=self.guidance.guide(pieces, rows, self._spans[bucket]))
            if self.teacher is not None:
                laid_out = teacher_tokens(self.teacher, pieces, rows, self.shapes[bucket])
                batch = batch._replace(teacher=laid_out)
            yield batch

    def rows(self, bucket: int) -> int:
        """Returns the rows of a batch of the row length with this number, before they are made a multiple."""
        return max(1, self.tokens // self.shapes[bucket])

    def _plans(self) -> Iterator[tuple[int, list[int]]]:
        """Row length and pieces of each batch."""
        rng = np.random.default_rng(self.seed)
        waiting: list[list[int]] = [[] for _ in self.shapes]
        while True:
            for number in rng.permutation(len(self.pieces)):
                bucket = self._bucket[number]
                waiting[bucket].append(int(number))
                if len(waiting[bucket]) == self.rows(bucket):
                    yield bucket, waiting[bucket]
                    waiting[bucket] = []
