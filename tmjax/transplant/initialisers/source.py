"""The rows of another model, mapped to the model's space by the ridge regression of the operator `embeddings`.

Every token is written by the other model's tokenizer, x is the mean of that model's rows over these pieces. The map
x B + b is fitted on the old tokens, each as often as it stands in the texts, once more than not at all. A new token
receives the mean of its old pieces plus (x - x^) B, where x^ is the mean of x over these pieces: what the other model
knows of it beyond its pieces.
"""

from typing import ClassVar

import numpy as np

from tmjax.text.token_map import TokenMap, read_token_map
from tmjax.text.writing import write_within
from tmjax.transfer.operators.embeddings import EmbeddingOptions, ridge_map
from tmjax.transplant.initialisers.base import MakeRows, NewTokens, SourceTables, mean_rows


class Source:
    """The other model's rows, through a ridge regression."""

    name: ClassVar[str] = "source"
    needs_source: ClassVar[bool] = True
    needs_texts: ClassVar[bool] = False

    def prepare(self, tokens: NewTokens) -> MakeRows:
        """See `Initialiser.prepare`."""
        assert tokens.source is not None
        source, ridge = tokens.source, EmbeddingOptions().ridge
        vectors = SourceVectors(tokens, source)

        def rows_of(path: str, table: np.ndarray) -> np.ndarray:
            result = mean_rows(tokens.correspondence.pieces, table)
            theirs = source.tables.get(path)
            if theirs is None or theirs.ndim != 2 or table.ndim != 2:
                return result
            x, y = vectors.old.mean_rows(theirs), np.asarray(table[vectors.old.ids], np.float32)
            weight, _ = ridge_map(x, y, vectors.old.counts + 1, ridge)
            known, own, parts = vectors.new(theirs, x)
            result[known] += (own - parts) @ weight.astype(np.float32)
            return result

        return rows_of


class SourceVectors:
    """Old and new tokens as the other model's tokenizer writes them.

    `old` maps old tokens to pieces of the other vocabulary, `written` the new ones (None: it cannot write it).
    """

    def __init__(self, tokens: NewTokens, source: SourceTables) -> None:
        sizes = tokens.old.rows or tokens.old.size, len(next(iter(source.tables.values())))
        self.old: TokenMap = read_token_map(tokens.old, source.tokenizer, tokens.texts, sizes)
        place = {int(number): at for at, number in enumerate(self.old.ids)}
        written = write_within(source.tokenizer, tokens.correspondence.strings)
        self._pieces = [
            ([place[old] for old in pieces], list(ids))
            if ids and max(ids) < sizes[1] and pieces and all(old in place for old in pieces)
            else None
            for ids, pieces in zip(written, tokens.correspondence.pieces, strict=True)
        ]

    def new(self, theirs: np.ndarray, old_x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Vectors of the new tokens.

        Args:
            theirs: Table of the other model [V', k].
            old_x: Vectors of the old tokens [n, k].

        Returns:
            Which new tokens have a vector [j], their vectors [j, k], and the means over their old pieces' [j, k].
        """
        known = np.array([number for number, pair in enumerate(self._pieces) if pair is not None], int)
        pairs = [pair for pair in self._pieces if pair is not None]
        own = mean_rows([ids for _, ids in pairs], theirs)
        return known, own, mean_rows([places for places, _ in pairs], old_x)


INITIALISER = Source()
