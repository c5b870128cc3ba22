"""What ways to initialise the rows of new tokens have in common."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from tmjax.text.tokenizer import TextTokenizer
from tmjax.transplant.correspondence import Correspondence

#: Makes the rows [m, ...] float32 of the new tokens from an old table [V, ...], which is named by its path.
MakeRows = Callable[[str, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class SourceTables:
    """Tables of another model, by path, with the vocabulary as their first axis, and its tokenizer."""

    tokenizer: TextTokenizer
    tables: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class NewTokens:
    """All that an initialiser may use: both tokenizers, which tokens are new, another model and texts where given."""

    old: TextTokenizer
    new: TextTokenizer
    correspondence: Correspondence
    source: SourceTables | None
    texts: Sequence[str]


class Initialiser(Protocol):
    """A way to initialise the rows of new tokens."""

    name: ClassVar[str]
    #: Whether another model and texts have to be given.
    needs_source: ClassVar[bool]
    needs_texts: ClassVar[bool]

    def prepare(self, tokens: NewTokens) -> MakeRows:
        """Prepares what all tables share; raises InputError."""
        ...


def mean_rows(pieces: Sequence[Sequence[int]], table: np.ndarray) -> np.ndarray:
    """Computes means of rows.

    Args:
        pieces: Rows of the table, for each of m means; none for the mean of all rows.
        table: Table [V, ...].

    Returns:
        Means [m, ...] float32.
    """
    whole = np.asarray(table, np.float32).mean(axis=0)
    means = np.empty((len(pieces), *table.shape[1:]), np.float32)
    for number, rows in enumerate(pieces):
        means[number] = np.asarray(table[list(rows)], np.float32).mean(axis=0) if rows else whole
    return means
