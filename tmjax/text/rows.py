"""Rows: pieces of text that two models see, found by character offsets so that two tokenizers agree on them.

`span`: every whitespace-delimited piece is a row. `sequence`: every document is one row. A row's value is the mean over
the tokens that overlap its characters; special and pad tokens never count.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tmjax.errors import InputError, RowMismatchError
from tmjax.text.documents import Texts
from tmjax.text.tokenizer import Encoding, TextTokenizer

Pooling = Literal["sequence", "span"]
_PIECE = re.compile(r"\S+")


@dataclass(frozen=True)
class Rows:
    """Identity of every row: document number and character range [start, end), plus the hash of the texts."""

    texts_sha256: str
    pooling: str
    document: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    def require_same(self, other: "Rows") -> None:
        """Raises RowMismatchError unless both name the same pieces of the same texts in the same order."""
        if self.texts_sha256 != other.texts_sha256:
            raise RowMismatchError("source and target activations come from different texts; extract both again")
        if self.pooling != other.pooling or len(self) != len(other):
            raise RowMismatchError(
                f"source and target rows differ: {len(self)} {self.pooling} against {len(other)} {other.pooling} rows"
            )
        for name in ("document", "start", "end"):
            different = np.nonzero(getattr(self, name) != getattr(other, name))[0]
            if len(different):
                raise RowMismatchError(f"row {different[0]} is another piece of text in the source than in the target")


@dataclass(frozen=True)
class TokenisedDocument:
    """One document as one model reads it: ids with BOS, and the token positions of each of its rows."""

    ids: list[int]
    rows: list[list[int]]


def spans(text: str) -> list[tuple[int, int]]:
    """Character ranges of the whitespace-delimited pieces of a text."""
    return [match.span() for match in _PIECE.finditer(text)]


def pair_rows(
    texts: Texts, tokenizers: Sequence[TextTokenizer], *, pooling: Pooling, max_tokens: int
) -> tuple[Rows, list[list[TokenisedDocument]]]:
    """The rows that all tokenizers share, and each tokenizer's documents (in the order of the texts) with those rows.

    A document longer than `max_tokens` in any model is cut, for all of them, at the first character that one of them
    no longer reads. Rows without an ordinary token in one of the models are dropped in all. Raises InputError if no row
    is left.
    """
    encodings = [tokenizer.encode(texts.texts) for tokenizer in tokenizers]
    documents: list[list[TokenisedDocument]] = [[] for _ in tokenizers]
    identity: list[tuple[int, int, int]] = []
    for number, text in enumerate(texts.texts):
        encoded = [encoding[number] for encoding in encodings]
        limit = min(_readable(encoding, max_tokens - 1, len(text)) for encoding in encoded)
        pieces = spans(text) if pooling == "span" else [(0, limit)]
        pieces = [piece for piece in pieces if piece[1] <= limit]
        positions = [
            _positions(encoding, pieces, limit, tokenizer.special_ids)
            for encoding, tokenizer in zip(encoded, tokenizers, strict=True)
        ]
        shared = [i for i in range(len(pieces)) if all(model[i] for model in positions)]
        identity += [(number, *pieces[i]) for i in shared]
        for model, encoding in enumerate(encoded):
            ids = [tokenizers[model].prefix, *encoding.ids[: max_tokens - 1]]
            documents[model].append(TokenisedDocument(ids, [positions[model][i] for i in shared]))
    if not identity:
        raise InputError(f"{texts.path}: no piece of text is read by both models; look at the texts and the tokenizers")
    document, start, end = (np.asarray(column, np.int32) for column in zip(*identity, strict=True))
    return Rows(texts.sha256, pooling, document, start, end), documents


def sample_rows(
    rows: Rows, documents: list[list[TokenisedDocument]], max_rows: int, seed: int
) -> tuple[Rows, list[list[TokenisedDocument]]]:
    """At most `max_rows` of the rows, the same ones for every model, in their order.

    Every document keeps the same share of its rows, to within one; which ones, the seed decides. Documents are read as
    before, also by those whose rows are all left out.
    """
    if len(rows) <= max_rows:
        return rows, documents
    counts = np.bincount(rows.document, minlength=len(documents[0])).astype(np.int64)
    ends = np.cumsum(counts)
    quotas = np.diff(ends * max_rows // len(rows), prepend=0)
    generator = np.random.default_rng(seed)
    chosen = [np.sort(generator.permutation(count)[:quota]) for count, quota in zip(counts, quotas, strict=True)]
    index = np.concatenate([first + part for first, part in zip(ends - counts, chosen, strict=True)])
    kept = [
        [replace(document, rows=[document.rows[i] for i in part]) for document, part in zip(model, chosen, strict=True)]
        for model in documents
    ]
    return replace(rows, document=rows.document[index], start=rows.start[index], end=rows.end[index]), kept


def _readable(encoding: Encoding, tokens: int, length: int) -> int:
    """End of the text that the first `tokens` tokens cover."""
    if len(encoding.ids) <= tokens:
        return length
    return encoding.offsets[tokens][0]


def _positions(
    encoding: Encoding, pieces: Sequence[tuple[int, int]], limit: int, special: frozenset[int]
) -> list[list[int]]:
    """For each piece the positions (after BOS) of the ordinary tokens that overlap it."""
    positions: list[list[int]] = [[] for _ in pieces]
    first = 0
    for position, (token, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True), start=1):
        if token in special or end <= start or end > limit:
            continue
        while first < len(pieces) and pieces[first][1] <= start:
            first += 1
        for index in range(first, len(pieces)):
            if pieces[index][0] >= end:
                break
            positions[index].append(position)
    return positions
