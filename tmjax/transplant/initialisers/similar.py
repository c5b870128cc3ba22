"""Sparse averages of similar kept tokens (after Dobler and de Melo 2023, *FOCUS*).

Tokens are compared by the company that they keep in the given texts, written in the new vocabulary: singular vectors of
the positive pointwise mutual information of tokens at most five places apart (Levy and Goldberg 2014), in place of the
fastText vectors of FOCUS. Weights are the sparsemax (Martins and Astudillo 2016) of the cosines with all kept tokens. A
token that the texts do not have is the mean of its old pieces.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from tmjax.errors import InputError
from tmjax.text.tokenizer import TextTokenizer
from tmjax.transplant.initialisers.base import MakeRows, NewTokens, mean_rows

_WINDOW = 5
_DIMENSIONS = 128
#: New tokens that are compared with all kept ones at a time.
_ROWS = 1024


class Similar:
    """The weighted mean over similar kept tokens."""

    name: ClassVar[str] = "similar"
    needs_source: ClassVar[bool] = False
    needs_texts: ClassVar[bool] = True

    def prepare(self, tokens: NewTokens) -> MakeRows:
        """See `Initialiser.prepare`."""
        of_new, rows = tokens.correspondence, len(tokens.correspondence.kept)
        vectors, seen = company_vectors(tokens.new, tokens.texts, rows)
        ids, partners = of_new.shared()
        ids, partners = ids[seen[ids]], partners[seen[ids]]
        known = np.flatnonzero(seen[of_new.new])
        if not len(ids):
            raise InputError("the texts have no token that both vocabularies share; give more text, or another --init")
        weights = np.concatenate(
            [
                sparsemax(vectors[of_new.new[known[first : first + _ROWS]]] @ vectors[ids].T)
                for first in range(0, len(known), _ROWS)
            ]
            or [np.zeros((0, len(ids)), np.float32)]
        )

        def rows_of(_: str, table: np.ndarray) -> np.ndarray:
            result = mean_rows(of_new.pieces, table)
            anchors = np.asarray(table[partners], np.float32)
            result[known] = np.tensordot(weights, anchors, axes=1)
            return result

        return rows_of


def company_vectors(tokenizer: TextTokenizer, texts: Sequence[str], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes unit vectors of tokens from the tokens near them.

    Args:
        tokenizer: Writes the texts.
        texts: Texts of the language or domain.
        rows: Number of rows of the vocabulary.

    Returns:
        Vectors [rows, k] float32, zero for tokens without one, and which tokens have one [rows] bool.
    """
    left, right = [], []
    for encoding in tokenizer.encode(texts):
        ids = np.array([number for number in encoding.ids if number < rows], int)
        for distance in range(1, _WINDOW + 1):
            left += [ids[:-distance], ids[distance:]]
            right += [ids[distance:], ids[:-distance]]
    places = tuple(np.concatenate(part) if part else np.zeros(0, int) for part in (left, right))
    counts = scipy.sparse.coo_array((np.ones(len(places[0])), places), shape=(rows, rows)).tocsr().tocoo()
    totals, whole = np.asarray(counts.sum(axis=1)).ravel(), counts.sum()
    near = np.log(np.maximum(counts.data * whole / (totals[counts.row] * totals[counts.col]), 1.0))
    matrix = scipy.sparse.csr_array((near, (counts.row, counts.col)), shape=(rows, rows))
    k = min(_DIMENSIONS, rows - 1, max(1, int((totals > 0).sum()) - 1))
    start = np.random.default_rng(0).normal(size=rows)
    u, s, _ = scipy.sparse.linalg.svds(matrix, k=k, v0=start)
    vectors = (u * np.sqrt(s)).astype(np.float32)
    size = np.linalg.norm(vectors, axis=1)
    seen = size > 1e-6
    return np.where(seen[:, None], vectors / np.maximum(size, 1e-6)[:, None], 0.0).astype(np.float32), seen


def sparsemax(scores: np.ndarray) -> np.ndarray:
    """Projects rows on the simplex: weights >= 0 of sum 1, most of them zero.

    Args:
        scores: Scores [m, n].

    Returns:
        Weights [m, n] float32.
    """
    ordered = -np.sort(-scores.astype(np.float64), axis=1)
    sums = np.cumsum(ordered, axis=1) - 1
    number = np.arange(1, scores.shape[1] + 1)
    support = (ordered * number > sums).sum(axis=1)
    threshold = sums[np.arange(len(scores)), support - 1] / support
    return np.maximum(scores - threshold[:, None], 0).astype(np.float32)


INITIALISER = Similar()
