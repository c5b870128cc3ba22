"""Texts as source and target both read them, and the source's probabilities at the positions that they share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tmjax.teacher.lines import Examples, line_ends, read_lines
from tmjax.teacher.probabilities import Search, TeacherProbabilities, probabilities_at
from tmjax.teacher.teacher_model import Teacher
from tmjax.teacher.vocabulary_map import Crossing
from tmjax.text.tokenizer import TextTokenizer


class Shared(NamedTuple):
    """Texts as two models read them.

    Attributes:
        crossing: From the source's vocabulary to the target's.
        target: The target's token ids of every text, uncut, without prefix and suffix.
        source: The source's token ids of every row, prefix first, cut to the most tokens.
        pairs: Of every row the shared positions, int [n, 2]: the number of the place, the source's position.
        places: Of every place the text, and the target's position in it, int [N, 2].
    """

    crossing: Crossing
    target: list[list[int]]
    source: list[list[int]]
    pairs: list[np.ndarray]
    places: np.ndarray

    def asked(self, teacher: Teacher, search: Search | None, **options: Any) -> TeacherProbabilities:
        """Returns the probabilities at all places (see `probabilities_at`)."""
        result = probabilities_at(teacher, self.crossing, self.source, self.pairs, search=search, **options)
        document, position = self.places[result.position].T
        return result._replace(document=document, position=position)


def read_shared(
    teacher: Teacher,
    target: TextTokenizer,
    texts: Sequence[str],
    *,
    max_tokens: int,
    search: Search | None = None,
    examples: Examples | None = None,
) -> Shared:
    """Reads texts with both tokenizers.

    Args:
        teacher: The source.
        target: The target's tokenizer.
        texts: The texts.
        max_tokens: Most tokens of a text, in both vocabularies, prefix included; with examples, of the source's rows. A
            source that can read only so many positions reads fewer, so that continuations fit.
        search: How far continuations are followed.
        examples: Texts that the source reads before others; a row is a text unless there are any.

    Raises:
        InputError: There are examples, and the source's tokenizer drops line breaks.
    """
    tokenizer = teacher.tokenizer
    crossing = Crossing(target, tokenizer, line_ends(tokenizer) if examples else ())
    encoded, readings = crossing.read(texts)
    ids = [encoding.ids for encoding in encoded[0]]
    room = _room(teacher, max_tokens, search or Search())
    cut = [
        [reading.first(limit - 1) for reading in each] for each, limit in zip(readings, (max_tokens, room), strict=True)
    ]
    if examples:
        return Shared(crossing, ids, *read_lines(crossing, texts, cut[0], examples, max_tokens=room))
    shared = [crossing.shared_positions(*both) for both in zip(*cut, strict=True)]
    first = np.cumsum([0, *map(len, shared)])
    document = np.repeat(np.arange(len(shared), dtype=np.int32), np.diff(first))
    return Shared(
        crossing,
        ids,
        [[tokenizer.prefix, *encoding.ids[: room - 1]] for encoding in encoded[1]],
        [np.stack([first[n] + np.arange(len(each)), each[:, 1]], axis=1) for n, each in enumerate(shared)],
        np.stack([document, np.concatenate([np.zeros(0, np.int32), *(each[:, 0] for each in shared)])], axis=1),
    )


def _room(teacher: Teacher, max_tokens: int, search: Search) -> int:
    """Returns the most tokens of a text after which the longest continuation still has positions."""
    spec = teacher.spec
    return max_tokens if spec.bound is None else min(max_tokens, spec.max_positions - (search.steps - 1))


def probabilities_of_texts(
    teacher: Teacher,
    target: TextTokenizer,
    texts: Sequence[str],
    *,
    max_tokens: int,
    search: Search | None = None,
    examples: Examples | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TeacherProbabilities, dict[str, float]]:
    """Computes the source's probabilities of the target's next tokens at all shared positions of texts.

    Args:
        teacher: The source.
        target: The target's tokenizer.
        texts: The texts.
        max_tokens: Most tokens of a text, in both vocabularies, prefix included.
        search: How far continuations are followed.
        examples: Given texts that the source reads before others.
        progress: Called with (rows done, all rows) after each batch.

    Returns:
        The probabilities, and facts: shared `positions`, all positions `of` the target, mean probability `mass` of the
        tokens kept.

    Raises:
        InputError: The two tokenizers share no position.
    """
    shared = read_shared(teacher, target, texts, max_tokens=max_tokens, search=search, examples=examples)
    result = shared.asked(teacher, search, progress=progress)
    tokens = sum(min(len(ids), max_tokens - 1) + 1 for ids in shared.target)
    mass = float(np.mean(result.weight.sum(axis=1)))
    return result, {"positions": len(result.document), "of": tokens, "mass": mass}
