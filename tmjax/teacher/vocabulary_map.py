"""Maps next tokens of a source to those of a target: two vocabularies over the same bytes.

A text that goes on with the bytes S has as its next target token the first one that the target's tokenizer makes of S.
That is mostly the longest token that S begins with, and the longest one is taken where the tokenizer cannot be asked: S
cuts a character, or the tokenizer reads it with other bytes. While S could still become a longer token it is open, and
further source tokens settle it.
"""

import contextlib
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tmjax.errors import InputError
from tmjax.text.reading import BEFORE, WITHIN, Reading, read
from tmjax.text.tokenizer import Encoding, TextTokenizer

#: Bytes of the tables that are kept: one for each string, so many bytes for each token of the source.
_TABLE_BYTES, _ENTRY_BYTES = 2**26, 6
#: Share of the common places at which two tokenizers may read other text than each other.
DIFFERING = 0.02
#: A pair that shares a lower part of the target's positions is warned of.
FEW = 0.3
NONE_SHARED = (
    "no position of the texts is a token's beginning for both tokenizers; these two models cannot be distilled"
)


class Readings(NamedTuple):
    """Readings of each source token, appended to some bytes, in the target's vocabulary.

    `token` [source vocab] int32: the longest target token that the whole begins with, -1 if none does, or what the
    target's tokenizer makes of the whole first, where it has been `asked` [source vocab] bool. `is_open` [source vocab]
    bool: whether the whole is the beginning of a longer token.
    """

    token: np.ndarray
    is_open: np.ndarray
    asked: np.ndarray


def _after(prefix: bytes) -> bytes | None:
    """The least byte string above all that begin with `prefix`; None if there is none."""
    cut = prefix.rstrip(b"\xff")
    return cut[:-1] + bytes([cut[-1] + 1]) if cut else None


class Crossing:
    """From the next tokens of a source to those of a target.

    Args:
        target: The target's tokenizer.
        source: The source's tokenizer.
        ends: Tokens that end a text for the source, beside its suffix.
    """

    def __init__(self, target: TextTokenizer, source: TextTokenizer, ends: Sequence[int] = ()) -> None:
        self.target, self.source = target, source
        self._ends = np.asarray(ends, np.int64)
        rows = target.size if target.rows is None else target.rows
        self._tokens = {piece: number for piece, number in target.vocabulary.written().items() if number < rows}
        self._sorted = sorted(self._tokens)
        # Several source tokens may have the same bytes.
        self._pieces = source.vocabulary.text
        order = sorted((piece, number) for number, piece in self._pieces.items() if piece)
        self._order = [piece for piece, _ in order]
        self._numbers = np.asarray([number for _, number in order])
        # A source may give probability to rows that are no tokens.
        self._size = max(source.size, source.rows or 0)
        self._longest = max(map(len, self._tokens))
        self._length = {number: len(piece) for piece, number in self._tokens.items()}
        (probe,) = target.encode(["a"])
        self._adds_space = b"".join(target.vocabulary.text.get(n) or b"" for n in probe.ids) == b" a"
        self.readings = lru_cache(max(16, _TABLE_BYTES // (_ENTRY_BYTES * self._size)))(self._readings)

    def piece(self, source_token: int) -> bytes:
        """The bytes of a source token."""
        return self._pieces[source_token]

    def token_of(self, text: bytes) -> int:
        """The longest target token that `text` begins with, or -1."""
        lengths = range(min(len(text), self._longest), 0, -1)
        return next((self._tokens[text[:n]] for n in lengths if text[:n] in self._tokens), -1)

    def tokens(self, text: bytes, source_tokens: np.ndarray) -> np.ndarray:
        """Reads source tokens after an open beginning.

        Args:
            text: The bytes of the beginning, empty at the start.
            source_tokens: Source tokens, int [...].

        Returns:
            The target tokens that `text` and each of them together begin with, -1 where none does, int32 [...].
        """
        readings = self.readings(text)
        fresh = np.unique(source_tokens[~readings.asked[source_tokens]])
        if len(fresh):
            readings.asked[fresh] = True
            self._ask(text, readings, fresh.tolist())
        return readings.token[source_tokens]

    def _ask(self, text: bytes, readings: Readings, source_tokens: Sequence[int]) -> None:
        """Replaces the longest target tokens by those that the target's tokenizer makes of the bytes first."""
        asked: list[tuple[int, bytes, str]] = []
        for number in source_tokens:
            whole = text + (self._pieces.get(number) or b"")
            longest = self._length.get(int(readings.token[number]))
            if longest is None or longest == len(whole):
                continue
            # A space that the tokenizer puts before a text stands for the one that is there.
            spelt = whole[1:] if self._adds_space and whole.startswith(b" ") else whole
            with contextlib.suppress(UnicodeDecodeError):
                asked.append((number, whole, spelt.decode()))
        if not asked:
            return
        for (number, whole, spelt), encoding in zip(
            asked, self.target.encode([spelt for *_, spelt in asked]), strict=True
        ):
            strings = read(spelt, encoding, self.target).strings
            if None not in strings and b"".join(strings) == whole and encoding.ids[0] in self._length:
                readings.token[number] = encoding.ids[0]

    def _within(self, pieces: Sequence[bytes], prefix: bytes) -> slice:
        after = _after(prefix)
        return slice(bisect_left(pieces, prefix), len(pieces) if after is None else bisect_left(pieces, after))

    def _readings(self, text: bytes) -> Readings:
        """Reads every source token after `text`, the bytes of an open beginning (empty at the start)."""
        settled = self.token_of(text)
        token, is_open = np.full(self._size, -1, np.int32), np.zeros(self._size, bool)
        token[self._numbers] = settled
        token[self.source.suffix] = settled if text else self.target.suffix
        longer = [piece for piece in self._sorted[self._within(self._sorted, text)] if len(piece) > len(text)]
        for piece in sorted(longer, key=len):
            rest = piece[len(text) :]
            token[self._numbers[self._within(self._order, rest)]] = self._tokens[piece]
            for length in range(1, len(rest)):
                for number in self.source.vocabulary.ids.get(rest[:length], ()):
                    is_open[number] = True
        asked = np.zeros(self._size, bool)
        if not text:
            token[self._ends], is_open[self._ends], asked[self._ends] = self.target.suffix, False, True
        return Readings(token, is_open, asked)

    def shared_positions(self, target: Reading, source: Reading) -> np.ndarray:
        """Pairs (target, source) [n, 2] of positions in a text, prefix included, that both go on from alike.

        Where a text was cut for one of them, pairs go as far as both. There is no pair where one of them has a special
        token next, or text that it changed.
        """
        pairs, alike, _ = self._compared(target, source)
        return pairs[alike]

    def _compared(self, target: Reading, source: Reading) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs of positions at the same place of the text [n, 2], whether both go on with the same bytes [n], and
        whether with different ones [n]; neither where a special token is next."""
        places, first, second = np.intersect1d(target.starts, source.starts, return_indices=True)
        kept = places != WITHIN
        pairs = np.stack([first[kept], second[kept]], axis=1).astype(np.int32)
        alike, different = np.ones(len(pairs), bool), np.zeros(len(pairs), bool)
        if target.exact and source.exact and None not in target.strings and None not in source.strings:
            return pairs, alike, different
        both = target.strings, source.strings
        whole = [b"".join(piece or b"" for piece in strings) for strings in both]
        begin = [np.cumsum([0, *(len(piece or b"") for piece in strings)]) for strings in both]
        for number, pair in enumerate(pairs.tolist()):
            ended = [at == len(strings) for at, strings in zip(pair, both, strict=True)]
            if any(ended):
                alike[number], different[number] = all(ended), not all(ended)
                continue
            following = [strings[at] for at, strings in zip(pair, both, strict=True)]
            if None in following:
                alike[number] = False
                continue
            size = max(map(len, following)) if all(following) else 0
            shown = [text[starts[at] :][:size] for at, text, starts in zip(pair, whole, begin, strict=True)]
            alike[number] = size > 0 and shown[0] == shown[1]
            different[number] = not alike[number]
        return pairs, alike, different

    def read(self, texts: Sequence[str]) -> tuple[list[list[Encoding]], list[list[Reading]]]:
        """Encodings and readings of texts, by the target and by the source."""
        both = self.target, self.source
        encodings = [tokenizer.encode(texts) for tokenizer in both]
        readings = [
            [read(text, encoding, tokenizer) for text, encoding in zip(texts, own, strict=True)]
            for own, tokenizer in zip(encodings, both, strict=True)
        ]
        return encodings, readings

    def differing(self, texts: Sequence[str], readings: Sequence[Sequence[Reading]]) -> tuple[float, str]:
        """Share of the places where both begin a token at which they go on with different bytes; the first such one."""
        places, differing, shown = 0, 0, ""
        for text, target, source in zip(texts, *readings, strict=True):
            pairs, _, different = self._compared(target, source)
            places, differing = places + len(pairs), differing + int(different.sum())
            if different.any() and not shown:
                shown = self._shown(text, target, source, pairs[different][0].tolist())
        return differing / max(places, 1), shown

    def _shown(self, text: str, target: Reading, source: Reading, pair: Sequence[int]) -> str:
        """Names the tokenizer that changes a text at a pair of positions, and the change."""
        place = int(target.starts[pair[0]])
        given = b" " + text.encode() if place == BEFORE else text.encode()[place:]
        following = [reading.strings[at : at + 1] for reading, at in zip((target, source), pair, strict=True)]
        pieces = [item[0] if item else b"" for item in following]
        changes = [not piece or not given.startswith(piece) for piece in pieces]
        which = changes.index(True) if True in changes else 1
        piece, name = pieces[which], (self.target, self.source)[which].name
        reads = repr(piece.decode(errors="replace")) if piece else "an unknown token or nothing"
        there = repr(given[: max(len(piece), 12)].decode(errors="ignore"))
        return f"the tokenizer of {name} reads {reads} where the text has {there}"


def require_shared(
    target: TextTokenizer, source: TextTokenizer, texts: Sequence[str], *, otherwise: str
) -> tuple[int, int]:
    """Counts the target's positions in texts that the source shares.

    Args:
        target: The target's tokenizer.
        source: The source's tokenizer.
        texts: The texts.
        otherwise: What to do instead, appended to the error.

    Returns:
        The number of shared positions, and of all positions of the target.

    Raises:
        InputError: The source's next tokens cannot be read as the target's: the two read different texts, or share no
            position.
    """
    crossing = Crossing(target, source)
    encodings, readings = crossing.read(texts)
    share, shown = crossing.differing(texts, readings)
    if share > DIFFERING:
        raise InputError(
            f"at {share:.0%} of the places where both begin a token {shown}; the source's probabilities cannot be read "
            f"as the target's; {otherwise}"
        )
    shared = sum(len(crossing.shared_positions(*both)) for both in zip(*readings, strict=True))
    if not shared:
        raise InputError(f"{NONE_SHARED}; {otherwise}")
    return shared, sum(len(encoding.ids) + 1 for encoding in encodings[0])


def few_shared(positions: float, of: float) -> str | None:
    """Returns a warning if a source has probabilities at few of the target's positions, else None."""
    if positions >= FEW * of:
        return None
    return (
        f"only {positions:,} of the target's {of:,} positions ({positions / of:.1%}) are a token's beginning for both "
        "tokenizers: the source is heard at few places"
    )
