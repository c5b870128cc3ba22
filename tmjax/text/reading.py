"""Readings: which bytes of a text each of its tokens stands for.

Where the tokens' bytes in a row are the text's, with or without a space before it, they are taken as they are. Else the
tokenizer changed the text (case, accents, compatibility forms, runs of spaces), and the character offsets of its tokens
say what each of them was made of; spaces that belong to no token go to the one behind them.
"""

from dataclasses import dataclass

import numpy as np

from tmjax.text.tokenizer import Encoding, TextTokenizer

#: Beginning of a token whose first character is a space that the tokenizer put before the text.
BEFORE = -1
#: Beginning of a token within a character, or within the normalised form of a character.
WITHIN = -2


@dataclass(frozen=True)
class Reading:
    """One text as a tokenizer reads it.

    `starts` [n + 1] int64: the byte of the text at which each of its n tokens begins, or `BEFORE` or `WITHIN`; the
    last is the text's end. `strings` are the tokens' bytes in the vocabulary: None for special tokens, none for unknown
    text. `exact`: these are the text's own.
    """

    starts: np.ndarray
    strings: tuple[bytes | None, ...]
    exact: bool

    def first(self, tokens: int) -> "Reading":
        """The same, known as far as the first `tokens` tokens."""
        return Reading(self.starts[: tokens + 1], self.strings, self.exact)

    def pieces(self, text: str) -> list[bytes]:
        """The text's bytes cut where tokens begin: what tokens begin within a character of goes with their first."""
        whole = text.encode()
        places = [place for place in np.unique(self.starts).tolist() if 0 < place < len(whole)]
        return [whole[start:end] for start, end in zip([0, *places], [*places, len(whole)], strict=True)]


def read(text: str, encoding: Encoding, tokenizer: TextTokenizer) -> Reading:
    """The reading of a text that `tokenizer` encoded; `encoding` is of the whole of it."""
    vocabulary = tokenizer.vocabulary
    strings = tuple(b"" if n == vocabulary.unknown else vocabulary.text.get(n) for n in encoding.ids)
    spelt = [
        vocabulary.special[number].encode() if string is None else string
        for number, string in zip(encoding.ids, strings, strict=True)
    ]
    whole, given = b"".join(spelt), text.encode()
    if whole in (given, b" " + given):
        starts = np.cumsum([0, *map(len, spelt)]) - (len(whole) - len(given))
        return Reading(starts, strings, True)
    return Reading(_by_offsets(text, encoding, strings), strings, False)


def _by_offsets(text: str, encoding: Encoding, strings: tuple[bytes | None, ...]) -> np.ndarray:
    byte_of = np.cumsum([0, *(len(character.encode()) for character in text)])
    begin, end = (np.array([pair[side] for pair in encoding.offsets], np.int64) for side in (0, 1))
    upto = np.maximum.accumulate(np.concatenate([[0], end]))
    starts = byte_of[upto]
    starts[:-1][begin < upto[:-1]] = WITHIN
    starts[-1] = byte_of[-1]
    if strings and (strings[0] or b"").startswith(b" ") and not text[:1].isspace():
        starts[0] = BEFORE
    return starts
