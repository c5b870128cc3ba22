"""Texts as lines: a source that knows texts by other conventions reads given ones first, a line each.

After some given texts even a chat model expects another one: its probabilities of the first tokens, of the subject and
of the end are then those of such texts. Several texts stand in a row, so that the examples before them are read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tmjax.errors import InputError
from tmjax.teacher.vocabulary_map import Crossing
from tmjax.text.reading import WITHIN, Reading, read
from tmjax.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Examples:
    """Given texts of which `count` are drawn, with `seed`, to stand before others; None: as many as are needed."""

    given: tuple[str, ...]
    count: int | None
    seed: int

    def drawn(self, number: int, without: Sequence[str] = ()) -> list[str]:
        """Returns the lines before row `number`: different given texts, none of those `without`."""
        excluded = {as_line(text) for text in without}
        allowed = [line for line in map(as_line, self.given) if line not in excluded]
        # A stream of its own: other draws of a run are those of a run without examples.
        rng = np.random.default_rng([self.seed, 2, number])
        chosen = rng.choice(len(allowed), size=min(self.count, len(allowed)), replace=False)
        return [allowed[i] for i in chosen]


def as_line(text: str) -> str:
    """Returns a text on one line."""
    return " ".join(text.split())


def keeps_lines(tokenizer: TextTokenizer) -> bool:
    """Returns whether a tokenizer keeps line breaks, by which a text is told from the examples before it."""
    (encoding,) = tokenizer.encode(["a\nb"])
    return tokenizer.decode(encoding.ids).count("\n") == 1


def require_lines(tokenizer: TextTokenizer) -> None:
    """Raises InputError if a tokenizer loses line breaks."""
    if not keeps_lines(tokenizer):
        raise InputError(
            f"the tokenizer of {tokenizer.name} drops line breaks, which set texts apart from examples; set "
            "examples to 0"
        )


def line_ends(tokenizer: TextTokenizer) -> list[int]:
    """Returns the tokens that begin with a line break: those that end a line."""
    return [number for number, piece in tokenizer.vocabulary.text.items() if piece and piece.startswith(b"\n")]


def _rows(sizes: Sequence[int], room: int) -> list[range]:
    """Cuts texts of these sizes, in order, into rows of at most `room`, of at least one text each."""
    rows, start, filled = [], 0, 0
    for number, size in enumerate(sizes):
        if number > start and filled + size > room:
            rows.append(range(start, number))
            start, filled = number, 0
        filled += size
    return [*rows, range(start, len(sizes))]


def _part(whole: Reading, begin: int, end: int) -> tuple[Reading, int]:
    """Returns the reading of bytes `begin` to `end` of a text that a token begins with, and that token's number."""
    starts = whole.starts[:-1]
    inside = np.flatnonzero((starts >= begin) & (starts <= end))
    if not len(inside):
        return Reading(np.zeros(0, np.int64), (), whole.exact), 0
    first = int(inside[0])
    # Tokens within a character have no place of their own.
    chosen = starts[first : int(inside[-1]) + 1]
    places = np.where(chosen == WITHIN, WITHIN, chosen - begin)
    inner = len(places) - int(places[-1] == end - begin)
    return Reading(places, whole.strings[first : first + inner], whole.exact), first


def read_lines(
    crossing: Crossing, texts: Sequence[str], targets: Sequence[Reading], examples: Examples, *, max_tokens: int
) -> tuple[list[list[int]], list[np.ndarray], np.ndarray]:
    """Reads texts as lines after examples with the source's tokenizer.

    Args:
        crossing: From the source's vocabulary to the target's.
        texts: The texts.
        targets: Their readings by the target, as far as they are wanted.
        examples: The texts that stand before them.
        max_tokens: Most tokens of a row, prefix included.

    Returns:
        The source's token ids of every row; of every row the shared positions [n, 2]: the number of the place, the
        position in the row; and of every place the text and the target's position in it [N, 2].

    Raises:
        InputError: The source's tokenizer drops line breaks.
    """
    source = crossing.source
    require_lines(source)
    sizes = [len(encoding.ids) + 1 for encoding in source.encode(list(texts))]
    lines = dict.fromkeys(map(as_line, examples.given))
    size_of = {x: len(e.ids) + 1 for x, e in zip(lines, source.encode(list(lines)), strict=True)}
    room, typical = max_tokens - 1, int(np.median(list(size_of.values())))
    rows = _rows(sizes, room - examples.count * typical)
    contexts = []
    for number, row in enumerate(rows):
        chosen = examples.drawn(number, [texts[n] for n in row])
        # A long text is not cut for the examples before it.
        while chosen and sum(map(size_of.__getitem__, chosen)) + sum(sizes[n] for n in row) > room:
            chosen.pop()
        contexts.append("".join(f"{line}\n" for line in chosen))
    wholes = [c + "".join(f"{texts[n]}\n" for n in row) for c, row in zip(contexts, rows, strict=True)]
    ids, pairs, places = [], [], []
    for row, context, whole, encoding in zip(rows, contexts, wholes, source.encode(wholes), strict=True):
        reading = read(whole, encoding, source)
        begin, own = len(context.encode()), []
        for number in row:
            end = begin + len(texts[number].encode())
            part, first = _part(reading, begin, end)
            shared = crossing.shared_positions(targets[number], part) + np.array([0, first])
            shared = shared[shared[:, 1] < max_tokens]
            own.append(np.stack([len(places) + np.arange(len(shared)), shared[:, 1]], axis=1))
            places += [(number, place) for place in shared[:, 0].tolist()]
            begin = end + 1
        ids.append([source.prefix, *encoding.ids][:max_tokens])
        pairs.append(np.concatenate(own).astype(np.int32))
    return ids, pairs, np.asarray(places, np.int32).reshape(-1, 2)
