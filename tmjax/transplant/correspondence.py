"""The tokens of a new vocabulary in the old one: rows that stay, tokens that are new and their old pieces."""

from dataclasses import dataclass

import numpy as np

from tmjax.text.tokenizer import TextTokenizer, shared_tokens
from tmjax.text.writing import write_longest, write_within


@dataclass(frozen=True, eq=False)
class Correspondence:
    """The rows of a new vocabulary.

    `kept` [rows] is the old row of each new one, -1 where there is none. `new` [m] are the ids of tokens that are text
    and new, `strings` their bytes, `pieces` the old tokens that each is written with. All other rows (`rest`) are
    special tokens without a counterpart, holes and padding.
    """

    kept: np.ndarray
    new: np.ndarray
    strings: tuple[bytes, ...]
    pieces: tuple[tuple[int, ...], ...]

    @property
    def rest(self) -> np.ndarray:
        """Rows that are neither kept nor tokens that are text."""
        rest = self.kept < 0
        rest[self.new] = False
        return np.flatnonzero(rest)

    def shared(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the kept rows, in the new vocabulary and in the old one."""
        ids = np.flatnonzero(self.kept >= 0)
        return ids, self.kept[ids]


def correspond(old: TextTokenizer, new: TextTokenizer, rows: tuple[int, int], *, same_ids: bool) -> Correspondence:
    """Finds the old row, or the old pieces, of every token of a new vocabulary.

    Args:
        old: Tokenizer of the model.
        new: Its new tokenizer.
        rows: Rows of the old embedding and of the new one.
        same_ids: Whether the new tokenizer is the old one with more tokens; otherwise tokens are paired by their bytes,
            special tokens by their names.

    Returns:
        The correspondence.
    """
    old_rows, new_rows = rows
    kept = np.full(new_rows, -1)
    if same_ids:
        fewer = min(old_rows, new_rows)
        kept[:fewer] = np.arange(fewer)
        kept[[number for number in new.vocabulary.text if number not in old.vocabulary.text and number < new_rows]] = -1
    else:
        ids, partners = (np.array(part, int) for part in shared_tokens(new, old))
        fits = (ids < new_rows) & (partners < old_rows)
        kept[ids[fits]] = partners[fits]
    fresh = [(number, text) for number, text in new.vocabulary.text.items() if number < new_rows and kept[number] < 0]
    strings = tuple(text for _, text in fresh)
    pieces = []
    for text, written in zip(strings, write_within(old, strings), strict=True):
        # Parts of characters are no text; the old tokens of their bytes are.
        tokens = written if written is not None else write_longest(old, text)
        pieces.append(tuple(token for token in tokens or () if token < old_rows))
    return Correspondence(kept, np.array([number for number, _ in fresh], int), strings, tuple(pieces))
