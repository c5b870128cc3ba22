"""Bytes of a text that its tokens do not tell: under an unknown token, or dropped on the way to tokens.

A model that reads `<unk>` for a word predicts next to nothing and would score well. So a score charges every such byte
with 8 bits (`hidden_nats`), a uniform code over bytes, beside the unknown token's own negative log-likelihood: what is
scored is then a code from which the text can be read back, and no tokenizer gains by what it does not know.

Characters that a normaliser changes (lower case, NFKC) are counted, not charged: the score is of the changed text.
"""

import functools
import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from tmjax.text.tokenizer import Encoding, TextTokenizer

BITS_PER_BYTE = 8
#: Share of hidden or changed bytes from which on it is worth a warning.
WORTH_SAYING = 0.01
_SPACE = "\u2581"


class Hidden(NamedTuple):
    """Bytes of each text [D] that its tokens do not tell, and that they tell in another form."""

    unknown: np.ndarray
    changed: np.ndarray


def hidden_nats(unknown: np.ndarray) -> np.ndarray:
    """Computes the charge of hidden bytes, in nats."""
    return unknown * (BITS_PER_BYTE * math.log(2))


def hidden_bytes(tokenizer: TextTokenizer, texts: Sequence[str], encodings: Sequence[Encoding]) -> Hidden:
    """Counts the UTF-8 bytes of texts that their encodings hide or change."""
    reader = _Reader(tokenizer)
    pairs = [reader.hidden(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]
    return Hidden(*np.asarray(pairs, np.int64).reshape(-1, 2).T)


class _Reader:
    """Finds the hidden and changed characters of texts under one tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._backend = backend = tokenizer.backend
        self._normaliser = backend.normalizer
        self._unknown = tokenizer.vocabulary.unknown
        self._name = None if self._unknown is None else backend.id_to_token(self._unknown)
        model = backend.model
        # BPE without an unknown token leaves out characters that are no tokens, and its offsets are wrong from there.
        drops = isinstance(model, models.BPE) and not model.unk_token and not model.byte_fallback
        self._known = None if not drops or _is_byte_level(backend) else backend.get_vocab(True).keys()
        self._changes = functools.cache(self._changes_uncached)
        self._dropped = functools.cache(self._dropped_uncached)

    def hidden(self, text: str, encoding: Encoding) -> tuple[int, int]:
        """Bytes of a text that its tokens hide, and that they change."""
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        under = np.zeros(len(text), bool)
        if self._unknown is not None:
            for place in np.nonzero(np.asarray(encoding.ids) == self._unknown)[0]:
                start, end = offsets[place]
                if text[start:end].strip() != self._name:  # a text may spell it out
                    under[start:end] = True
        widths = _widths(text)
        if self._known is not None:
            under |= np.fromiter(map(self._dropped, text), bool, len(text))
            uncovered = ~under & np.fromiter(map(str.isspace, text), bool, len(text))
        else:
            edges = np.zeros(len(text) + 1, np.int64)
            np.add.at(edges, offsets[:, 0], 1)
            np.add.at(edges, offsets[:, 1], -1)
            uncovered = (np.cumsum(edges)[:-1] == 0) & ~under
        if uncovered.any():
            under |= self._lost(text, under, uncovered, encoding)
        changed = sum(int(widths[place]) for place in np.nonzero(~under)[0] if self._changes(text[place]))
        return int(widths[under].sum()), changed

    def _lost(self, text: str, under: np.ndarray, uncovered: np.ndarray, encoding: Encoding) -> np.ndarray:
        """Finds the lost ones of the uncovered characters: all but white space that decoding gives back.

        Offsets leave out white space that belongs to tokens.
        """
        space = np.fromiter(map(str.isspace, text), bool, len(text))
        lost = uncovered & ~space
        between = np.nonzero(uncovered & space)[0]
        if len(between):
            decoded = self._backend.decode(encoding.ids, skip_special_tokens=False)
            marks = sum(self._backend.id_to_token(number).count(_SPACE) for number in encoding.ids)
            given = max(marks, sum(character.isspace() or character == _SPACE for character in decoded))
            missing = int((space & ~under).sum()) - given
            lost[between[: max(0, missing)]] = True
        return lost

    def _changes_uncached(self, character: str) -> bool:
        """Whether the normaliser makes another character of this one that does not stand for the same text."""
        made = self._normalised(character)
        if character.isspace() or made == "":
            return False
        return unicodedata.normalize("NFC", made) != unicodedata.normalize("NFC", character)

    def _dropped_uncached(self, character: str) -> bool:
        """Whether a BPE model without an unknown token leaves a character out."""
        if character.isspace():
            return character != " " and character not in self._known
        made = self._normalised(character)
        return made == "" or not all(part in self._known for part in made)

    def _normalised(self, character: str) -> str:
        if self._normaliser is None:
            return character
        return "".join(self._normaliser.normalize_str(character).replace(_SPACE, " ").split())


def _is_byte_level(backend: Tokenizer) -> bool:
    """Whether every byte has a token: the 256 characters that a byte-level vocabulary writes them as."""
    return backend.get_vocab(True).keys() >= set(pre_tokenizers.ByteLevel.alphabet())


def _widths(text: str) -> np.ndarray:
    """UTF-8 bytes of every character."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
