"""Probabilities that a source gives to the target's next tokens, over another vocabulary, at every shared position.

At a byte position where both tokenizers have a boundary, the probability that the text goes on with a target token is
summed over the source tokens that spell it: source tokens that settle which target token comes, and chains of up to
`steps` of them where one alone leaves that open. Likely open beginnings are followed by reading them after the
cached text (`branches`); the others count for the longest target token that they begin with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from tmjax.errors import InputError
from tmjax.recipes.objectives import DistillationOptions
from tmjax.teacher.branches import Branches, Reader
from tmjax.teacher.teacher_model import Teacher
from tmjax.teacher.vocabulary_map import NONE_SHARED, Crossing
from tmjax.text.buckets import bucketed

#: Tokens of a batch of texts, padding included.
BATCH_TOKENS = 2048
#: Least probability of all tokens together that are not listed.
LEAST_REST = 1e-6


@dataclass(frozen=True)
class Search:
    """Limits of the search through a source's continuations.

    Attributes:
        steps: Most source tokens in a chain.
        candidates: Tokens of every distribution that are read, the likeliest ones.
        min_probability: An open beginning is followed if its probability is this or more.
        branches: Most beginnings that are followed per position and step.
        keep: Target tokens that are kept per position, the likeliest ones.
    """

    steps: int = 3
    candidates: int = 128
    min_probability: float = 0.02
    branches: int = 4
    keep: int = 32

    @classmethod
    def of(cls, options: DistillationOptions) -> Self:
        """Returns the settings of a recipe."""
        return cls(options.steps, options.candidates, options.min_probability, options.branches, options.keep)


class TeacherProbabilities(NamedTuple):
    """Probabilities of target tokens, one row per shared position.

    Attributes:
        document: Number of the text, int32 [N], ascending.
        position: Position in the target's tokens, int32 [N]; the row is about the token after it.
        ids: The likeliest tokens, int32 [N, k].
        weight: Their probabilities, float32 [N, k]; the remainder to 1 belongs to other tokens.
    """

    document: np.ndarray
    position: np.ndarray
    ids: np.ndarray
    weight: np.ndarray

    def reordered(self, order: np.ndarray) -> Self:
        """Returns the same positions with the distributions of the rows `order` [N]."""
        return self._replace(ids=self.ids[order], weight=self.weight[order])

    def log_probability(self, token_n: np.ndarray, vocab: int) -> np.ndarray:
        """Computes the log-probability of one token per position.

        Args:
            token_n: The tokens, int [N].
            vocab: Size of the vocabulary, over which the remainder of a position is spread evenly.

        Returns:
            Natural logarithms, float64 [N].
        """
        weight = self.weight.astype(np.float64)
        listed = np.sum(weight * (self.ids == token_n[:, None]), axis=1)
        rest = np.clip(1 - weight.sum(axis=1), LEAST_REST, 1.0) / vocab
        return np.log(np.maximum(listed, rest))

    def save(self, path: Path) -> None:
        """Writes the arrays to an `.npz` file."""
        with path.open("wb") as stream:
            np.savez(stream, **self._asdict())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a file written by `save`."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in cls._fields})


def next_tokens(probabilities: TeacherProbabilities, documents: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the token that follows each position in the documents' token ids, int [N]."""
    at = zip(probabilities.document.tolist(), probabilities.position.tolist(), strict=True)
    return np.asarray([documents[document][position + 1] for document, position in at])


class _Nodes(NamedTuple):
    """Entries of a batch (see `Branches`) at which the source is asked.

    `about` is the row of the result, `text` the bytes that the chain has spelt since its position, `mass` their
    probability.
    """

    entry: np.ndarray
    about: np.ndarray
    text: list[bytes]
    mass: np.ndarray


def _read(
    crossing: Crossing, nodes: _Nodes, ids: np.ndarray, weight: np.ndarray, search: Search, *, last: bool
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Reads candidate tokens `ids` [n, c] with probabilities `weight` after n nodes.

    Returns (row, target token, probability) of candidates that settle the target token, and (node, candidate) of open
    beginnings that are to be followed.
    """
    is_open = np.empty(ids.shape, bool)
    groups: dict[bytes, list[int]] = {}
    for number, text in enumerate(nodes.text):
        groups.setdefault(text, []).append(number)
    for text, members in groups.items():
        is_open[members] = crossing.readings(text).is_open[ids[members]]
    mass = nodes.mass[:, None] * weight
    follow = np.zeros_like(is_open)
    if not last:
        likely = np.argwhere(is_open & (mass >= search.min_probability))
        strength = mass[tuple(likely.T)]
        order = np.lexsort((-strength, nodes.about[likely[:, 0]]))
        about = nodes.about[likely[order, 0]]
        rank = np.arange(len(order)) - np.searchsorted(about, about)
        chosen = likely[order[rank < search.branches]]
        follow[tuple(chosen.T)] = True
    token, kept = np.full(ids.shape, -1, np.int32), ~follow
    for text, members in groups.items():
        node, column = np.nonzero(kept[members])
        node = np.asarray(members)[node]
        token[node, column] = crossing.tokens(text, ids[node, column])
    kept &= token >= 0
    about = np.broadcast_to(nodes.about[:, None], ids.shape)
    return (about[kept], token[kept], mass[kept]), tuple(np.nonzero(follow))


def sum_by_token(settled: Sequence[tuple[np.ndarray, ...]], positions: int, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums probabilities by position and token.

    Args:
        settled: Triples of arrays [n]: row of the result, token, probability.
        positions: Rows of the result.
        keep: Tokens that are kept per row.

    Returns:
        The likeliest tokens, int32 [positions, keep], and their sums, float32 of the same shape.
    """
    about, token, mass = (np.concatenate(column) for column in zip(*settled, strict=True))
    span = 1 + int(token.max())
    key, inverse = np.unique(about.astype(np.int64) * span + token, return_inverse=True)
    total = np.bincount(inverse, mass)
    about, token = key // span, key % span
    order = np.lexsort((-total, about))
    about, token, total = about[order], token[order], total[order]
    rank = np.arange(len(order)) - np.searchsorted(about, about)
    best = rank < keep
    ids, weight = np.zeros((positions, keep), np.int32), np.zeros((positions, keep), np.float32)
    ids[about[best], rank[best]], weight[about[best], rank[best]] = token[best], total[best]
    return ids, weight


def probabilities_at(
    teacher: Teacher,
    crossing: Crossing,
    documents: Sequence[Sequence[int]],
    pairs: Sequence[np.ndarray],
    *,
    search: Search | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TeacherProbabilities:
    """Computes the source's probabilities of target tokens at given positions.

    Args:
        teacher: The source.
        crossing: From the source's vocabulary to the target's.
        documents: The source's token ids of every text, prefix first.
        pairs: Of every text the positions, int [n, 2]: of the target, of the source.
        search: How far continuations are followed.
        batch_tokens: Most tokens of a batch, padding included.
        progress: Called with (texts done, all texts) after each batch.

    Returns:
        A row for every position.

    Raises:
        InputError: There is no position at all.
    """
    search, layout = search or Search(), teacher.layout
    first = np.concatenate([[0], np.cumsum([len(each) for each in pairs])]).astype(np.int64)
    count = int(first[-1])
    if not count:
        raise InputError(NONE_SHARED)
    result = TeacherProbabilities(
        np.repeat(np.arange(len(pairs), dtype=np.int32), np.diff(first)),
        np.concatenate([each[:, 0] for each in pairs]).astype(np.int32),
        np.zeros((count, search.keep), np.int32),
        np.zeros((count, search.keep), np.float32),
    )
    known = crossing.source.known(teacher.spec.vocab)
    candidates = min(search.candidates, teacher.spec.vocab if known is None else int(known.sum()))
    reader = Reader(teacher.spec, teacher.params, candidates, teacher.dtype, layout, known)
    done = 0
    for batch in bucketed([len(ids) for ids in documents], batch_tokens=batch_tokens, multiple=layout.batch_multiple):
        row = np.concatenate([np.full(len(pairs[d]), slot) for slot, d in enumerate(batch.documents)])
        number = np.concatenate([first[d] + np.arange(len(pairs[d])) for d in batch.documents])
        entry = np.concatenate([pairs[d][:, 1] for d in batch.documents])
        if len(row):
            read = [documents[d] for d in batch.documents]
            branches = Branches(reader, read, (batch.size, batch.tokens), search.steps - 1)
            nodes = _Nodes(row * batch.tokens + entry, np.arange(len(row)), [b""] * len(row), np.ones(len(row)))
            settled = _followed(crossing, branches, nodes, search)
            result.ids[number], result.weight[number] = sum_by_token(settled, len(row), search.keep)
        done += len(batch.documents)
        progress(done, len(documents))
    return result


def _followed(crossing: Crossing, branches: Branches, nodes: _Nodes, search: Search) -> list[tuple[np.ndarray, ...]]:
    """Follows the positions of a batch through all steps; returns what each step has settled."""
    settled = []
    for number in range(search.steps):
        ids, weight = branches.likeliest(nodes.entry)
        new, (node, candidate) = _read(crossing, nodes, ids, weight, search, last=number == search.steps - 1)
        settled.append(new)
        if not len(node):
            break
        token = ids[node, candidate]
        entry = branches.grow(nodes.entry[node], token)
        text = [nodes.text[n] + crossing.piece(int(t)) for n, t in zip(node, token, strict=True)]
        nodes = _Nodes(entry, nodes.about[node], text, nodes.mass[node] * weight[node, candidate])
    return settled
