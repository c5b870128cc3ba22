"""Bytes of a text that its tokens do not tell: under an unknown token, or dropped on the way to tokens.

A model that reads `<unk>` for a word predicts next to nothing and would score well. So a score charges every such byte
with 8 bits (`hidden_nats`), a uniform code over bytes, beside the unknown token's own negative log-likelihood: what is
scored is then a code from which the text can be read back, and no tokenizer gains by what it does not know.

Characters that a normaliser changes (lower case, NFKC) are counted, not charged: the score is of the changed text.
"""

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tmjax.hub.tokenizer import Encoding, TextTokenizer

BITS_PER_BYTE = 8
#: Share of hidden or changed bytes from which on it is worth a warning.
WORTH_SAYING = 0.01


class Hidden(NamedTuple):
    """Bytes of each text [D] that its tokens do not tell, and that they tell in another form."""

    unknown: np.ndarray
    changed: np.ndarray


def hidden_nats(unknown: np.ndarray) -> np.ndarray:
    """What hidden bytes are charged, in nats."""
    return unknown * (BITS_PER_BYTE * math.log(2))


def hidden_bytes(tokenizer: TextTokenizer, texts: Sequence[str], encodings: Sequence[Encoding]) -> Hidden:
    """Counts the UTF-8 bytes of texts that their encodings hide or change."""
    number, name = unknown_token(tokenizer.fast)
    unknown = [
        _unknown(tokenizer.fast, number, name, text, encoding) for text, encoding in zip(texts, encodings, strict=True)
    ]
    changed = functools.cache(functools.partial(_changes, tokenizer.fast.backend_tokenizer.normalizer))
    sizes = [sum(len(c.encode()) * n for c, n in Counter(text).items() if changed(c)) for text in texts]
    return Hidden(np.asarray(unknown, np.int64), np.asarray(sizes, np.int64))


def unknown_token(fast: Any) -> tuple[int | None, str | None]:
    """Id and text of the token that a tokenizer's model gives for what it does not know; None if it has none."""
    model = fast.backend_tokenizer.model
    number, name = getattr(model, "unk_id", None), getattr(model, "unk_token", None)
    if number is not None:
        return int(number), fast.convert_ids_to_tokens(int(number))
    if not name or getattr(model, "byte_fallback", False):
        # Where every byte has a token, the unknown one is met only where a text spells it out.
        return None, None
    return fast.backend_tokenizer.token_to_id(name), name


def _widths(text: str) -> np.ndarray:
    """UTF-8 bytes of every character."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)


def _unknown(fast: Any, number: int | None, name: str | None, text: str, encoding: Encoding) -> int:
    offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    under = np.zeros(len(text), bool)
    if number is not None:
        for place in np.nonzero(np.asarray(encoding.ids) == number)[0]:
            start, end = offsets[place]
            if text[start:end].strip() != name:  # a text may spell it out
                under[start:end] = True
    edges = np.zeros(len(text) + 1, np.int64)
    np.add.at(edges, offsets[:, 0], 1)
    np.add.at(edges, offsets[:, 1], -1)
    uncovered = np.cumsum(edges)[:-1] == 0
    widths = _widths(text)
    hidden = int(widths[under].sum())
    if not (uncovered & ~under).any():
        return hidden
    # Offsets leave out white space that belongs to tokens: what decoding gives back was not dropped.
    decoded = fast.decode(encoding.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    given, there = Counter(map(_kind, decoded)), Counter(map(_kind, (text[i] for i in np.nonzero(~under)[0])))
    missing: dict[str, list[int]] = {}
    for place in np.nonzero(uncovered & ~under)[0]:
        missing.setdefault(_kind(text[place]), []).append(int(widths[place]))
    for kind, sizes in missing.items():
        lost = min(len(sizes), max(0, there[kind] - given[kind]))
        hidden += sum(sorted(sizes, reverse=True)[:lost])
    return hidden


def _kind(character: str) -> str:
    """The character, all white space being one."""
    return " " if character.isspace() else character


def _changes(normaliser: Any, character: str) -> bool:
    """Whether a normaliser makes another character of this one that does not stand for the same text."""
    if normaliser is None or character.isspace():
        return False
    made = "".join(normaliser.normalize_str(character).replace("\u2581", " ").split())
    return made != "" and unicodedata.normalize("NFC", made) != unicodedata.normalize("NFC", character)
