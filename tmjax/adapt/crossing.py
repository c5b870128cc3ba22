"""How a source's next tokens read as a target's: two vocabularies over the same bytes.

A text that goes on with the bytes S has as its next target token the longest one that S begins with (which is what
byte-pair encoding picks nearly always). While S could still become a longer token it is open, and only further source
tokens tell.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tmjax.hub.tokenizer import TextTokenizer

#: Bytes of the tables that are kept: one for each string, 5 bytes for each token of the source.
_TABLE_BYTES = 2**26


class Readings(NamedTuple):
    """What each source token, written after some bytes, makes of them.

    `token` [source vocab] int32: the target token that the whole begins with, -1 if none does; `is_open` [source vocab]
    bool: whether the whole is the beginning of a longer one.
    """

    token: np.ndarray
    is_open: np.ndarray


def _after(prefix: bytes) -> bytes | None:
    """The least byte string above all that begin with `prefix`; None if there is none."""
    cut = prefix.rstrip(b"\xff")
    return cut[:-1] + bytes([cut[-1] + 1]) if cut else None


class Crossing:
    """From the next tokens of a source to those of a target."""

    def __init__(self, target: TextTokenizer, source: TextTokenizer) -> None:
        self.target, self.source = target, source
        own, other = target.strings(), source.strings()
        self._tokens = {piece: number for piece, number in own.items() if isinstance(piece, bytes) and piece}
        self._sorted = sorted(self._tokens)
        self._pieces = {piece: number for piece, number in other.items() if isinstance(piece, bytes) and piece}
        self._order = sorted(self._pieces)
        self._numbers = np.asarray([self._pieces[piece] for piece in self._order])
        self._bytes = [{number: piece for piece, number in held.items()} for held in (self._tokens, self._pieces)]
        self._size = 1 + max(other.values())
        self._longest = max(map(len, self._tokens))
        self.readings = lru_cache(max(16, _TABLE_BYTES // (5 * self._size)))(self._readings)

    def piece(self, source_token: int) -> bytes:
        """The bytes of a source token."""
        return self._bytes[1][source_token]

    def token_of(self, text: bytes) -> int:
        """The longest target token that `text` begins with, or -1."""
        lengths = range(min(len(text), self._longest), 0, -1)
        return next((self._tokens[text[:n]] for n in lengths if text[:n] in self._tokens), -1)

    def _within(self, pieces: Sequence[bytes], prefix: bytes) -> slice:
        after = _after(prefix)
        return slice(bisect_left(pieces, prefix), len(pieces) if after is None else bisect_left(pieces, after))

    def _readings(self, held: bytes) -> Readings:
        """What every source token makes of `held`, bytes that are open (none at the start)."""
        here = self.token_of(held)
        token, is_open = np.full(self._size, here, np.int32), np.zeros(self._size, bool)
        for number in self.source.special_ids | {self.source.prefix}:
            token[number] = -1
        token[self.source.suffix] = here if held else self.target.suffix
        longer = [piece for piece in self._sorted[self._within(self._sorted, held)] if len(piece) > len(held)]
        for piece in sorted(longer, key=len):
            rest = piece[len(held) :]
            token[self._numbers[self._within(self._order, rest)]] = self._tokens[piece]
            for length in range(1, len(rest)):
                beginning = self._pieces.get(rest[:length])
                if beginning is not None:
                    is_open[beginning] = True
        return Readings(token, is_open)

    def shared_positions(self, target_ids: Sequence[int], source_ids: Sequence[int]) -> np.ndarray:
        """Pairs (target, source) [n, 2] of positions in a document, prefix included, whose next token begins alike.

        `target_ids` and `source_ids` are the tokens of one text, without special ones; if it was cut for one of them,
        pairs go as far as both. There are no pairs if the two do not spell the same bytes (a tokenizer that changes its
        text); a space that one puts before it is no matter.
        """
        spelt = [
            [held.get(int(i)) for i in ids] for held, ids in zip(self._bytes, (target_ids, source_ids), strict=True)
        ]
        if any(piece is None for pieces in spelt for piece in pieces):
            return np.zeros((0, 2), np.int32)
        whole = [b"".join(pieces) for pieces in spelt]
        lead = [len(text) - len(text.lstrip(b" ")) for text in whole]
        texts = [text[skipped:] for text, skipped in zip(whole, lead, strict=True)]
        if not (texts[0].startswith(texts[1]) or texts[1].startswith(texts[0])):
            return np.zeros((0, 2), np.int32)
        starts = [np.cumsum([0, *map(len, pieces)]) - skipped for pieces, skipped in zip(spelt, lead, strict=True)]
        _, first, second = np.intersect1d(*starts, return_indices=True)
        pairs = np.stack([first, second], axis=1).astype(np.int32)
        # Where the two differ in a leading space, the beginning reads differently.
        return pairs if lead[0] == lead[1] else pairs[np.asarray(starts[0])[first] > 0]
