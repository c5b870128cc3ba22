"""What a source holds for the target's next token: probabilities over another vocabulary, at every shared position.

At a byte position where both tokenizers have a boundary, the probability that the text goes on with a target token is
summed over the source's ways to write it: source tokens that settle which target token comes, and chains of up to
`steps` of them where one alone leaves that open. Likely open beginnings are followed by reading them after the
cached text (`branches`); the others count for the longest target token they hold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.mesh import Layout
from tmjax.teacher.branches import Branches, Reader
from tmjax.teacher.vocabulary_map import NONE_SHARED, Crossing
from tmjax.text.buckets import bucketed
from tmjax.text.tokenizer import TextTokenizer, load_tokenizer
from tmjax.train.data import Piece
from tmjax.train.loss import Teaching
from tmjax.typing import Params


@dataclass(frozen=True)
class Search:
    """How far a source's continuations are followed.

    Of every distribution the `candidates` likeliest tokens are read; an open beginning is followed if its probability
    is `least` or more, up to `steps` source tokens in all, and at most `branches` a position and step. `keep` target
    tokens are kept per position.
    """

    steps: int = 3
    candidates: int = 128
    least: float = 0.02
    branches: int = 4
    keep: int = 32


class Taught(NamedTuple):
    """Probabilities of target tokens: `document` [N], `position` [N] (what is said there is about the next token),
    `ids` [N, k] int32, `weight` [N, k] float32; what a row lacks to 1 belongs to other tokens."""

    document: np.ndarray
    position: np.ndarray
    ids: np.ndarray
    weight: np.ndarray

    def teaching(self, pieces: Sequence[Piece], rows: int, tokens: int) -> Teaching:
        """What is taught at the positions of a batch; `pieces` are its first rows."""
        keep = self.ids.shape[1]
        ids, weight = np.zeros((rows, tokens, keep), np.int32), np.zeros((rows, tokens, keep), np.float32)
        mask = np.zeros((rows, tokens), np.float32)
        for slot, piece in enumerate(pieces):
            low, high = np.searchsorted(self.document, [piece.document, piece.document + 1])
            place = self.position[low:high] - piece.start
            within = (place >= 0) & (place < len(piece.ids) - 1)
            place, number = place[within], np.arange(low, high)[within]
            ids[slot, place], weight[slot, place], mask[slot, place] = self.ids[number], self.weight[number], 1.0
        return Teaching(ids, weight, mask)

    def save(self, path: Path) -> None:
        """Writes the arrays to an `.npz` file."""
        with path.open("wb") as stream:
            np.savez(stream, **self._asdict())

    @classmethod
    def load(cls, path: Path) -> "Taught":
        """What `save` wrote."""
        with np.load(path, allow_pickle=False) as held:
            return cls(**{name: held[name] for name in cls._fields})


class _Nodes(NamedTuple):
    """Entries of a batch at which the source is asked (see `Branches`): the position asked about, bytes written since,
    probability of these."""

    entry: np.ndarray
    about: np.ndarray
    held: list[bytes]
    mass: np.ndarray


def _read(
    crossing: Crossing, nodes: _Nodes, ids: np.ndarray, weight: np.ndarray, search: Search, *, last: bool
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """What is settled: (position asked about, target token, probability); what is to be followed: (node, candidate)."""
    token, is_open = np.empty(ids.shape, np.int32), np.empty(ids.shape, bool)
    groups: dict[bytes, list[int]] = {}
    for number, held in enumerate(nodes.held):
        groups.setdefault(held, []).append(number)
    for held, members in groups.items():
        readings = crossing.readings(held)
        token[members], is_open[members] = readings.token[ids[members]], readings.is_open[ids[members]]
    mass = nodes.mass[:, None] * weight
    follow = np.zeros_like(is_open)
    if not last:
        wanted = np.argwhere(is_open & (mass >= search.least))
        strength = mass[tuple(wanted.T)]
        order = np.lexsort((-strength, nodes.about[wanted[:, 0]]))
        about = nodes.about[wanted[order, 0]]
        rank = np.arange(len(order)) - np.searchsorted(about, about)
        chosen = wanted[order[rank < search.branches]]
        follow[tuple(chosen.T)] = True
    kept = ~follow & (token >= 0)
    about = np.broadcast_to(nodes.about[:, None], ids.shape)
    return (about[kept], token[kept], mass[kept]), tuple(np.nonzero(follow))


def _summed(settled: list[tuple[np.ndarray, ...]], positions: int, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """The `keep` likeliest target tokens of every position, [positions, keep], and their probabilities."""
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


def teach(
    spec: DecoderSpec,
    params: Params,
    crossing: Crossing,
    documents: Sequence[Sequence[int]],
    pairs: Sequence[np.ndarray],
    *,
    search: Search | None = None,
    batch_tokens: int = 2048,
    dtype: jnp.dtype = jnp.float32,
    layout: Layout | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Taught:
    """The source's probabilities of target tokens at `pairs` (target, source positions) of every document.

    `documents` are the source's token ids, prefix first; `spec` and `params` are the source's. Raises InputError if
    there is no such position at all.
    """
    search, layout = search or Search(), layout or Layout()
    first = np.concatenate([[0], np.cumsum([len(found) for found in pairs])]).astype(np.int64)
    count = int(first[-1])
    if not count:
        raise InputError(NONE_SHARED)
    result = Taught(
        np.repeat(np.arange(len(pairs), dtype=np.int32), np.diff(first)),
        np.concatenate([found[:, 0] for found in pairs]).astype(np.int32),
        np.zeros((count, search.keep), np.int32),
        np.zeros((count, search.keep), np.float32),
    )
    known = crossing.source.known(spec.vocab)
    candidates = min(search.candidates, spec.vocab if known is None else int(known.sum()))
    source = Reader(spec, params, candidates, dtype, layout, known)
    done = 0
    for batch in bucketed([len(ids) for ids in documents], batch_tokens=batch_tokens, multiple=layout.batch_multiple):
        row = np.concatenate([np.full(len(pairs[d]), slot) for slot, d in enumerate(batch.documents)])
        number = np.concatenate([first[d] + np.arange(len(pairs[d])) for d in batch.documents])
        entry = np.concatenate([pairs[d][:, 1] for d in batch.documents])
        if len(row):
            read = [documents[d] for d in batch.documents]
            branches = Branches(source, read, (batch.size, batch.tokens), search.steps - 1)
            nodes = _Nodes(row * batch.tokens + entry, np.arange(len(row)), [b""] * len(row), np.ones(len(row)))
            settled = _followed(crossing, branches, nodes, search)
            result.ids[number], result.weight[number] = _summed(settled, len(row), search.keep)
        done += len(batch.documents)
        progress(done, len(documents))
    return result


def teach_texts(
    model: Model,
    params: Params,
    target: TextTokenizer,
    texts: Sequence[str],
    *,
    most: int,
    search: Search | None = None,
    dtype: jnp.dtype = jnp.float32,
    layout: Layout | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Taught, dict[str, float]]:
    """What a source (`model` with `params`) holds for the next tokens of a target, on texts of at most `most` tokens.

    Also facts: shared positions, tokens that could be, mean probability that is held by the tokens kept.
    """
    source = load_tokenizer(model.directory, model.spec.vocab)
    crossing = Crossing(target, source)
    encoded, readings = crossing.read(texts)
    read = [[reading.first(most - 1) for reading in held] for held in readings]
    found = teach(
        model.spec,
        params,
        crossing,
        [[source.prefix, *encoding.ids[: most - 1]] for encoding in encoded[1]],
        [crossing.shared_positions(*both) for both in zip(*read, strict=True)],
        search=search,
        dtype=dtype,
        layout=layout,
        progress=progress,
    )
    tokens = sum(min(len(encoding.ids), most - 1) + 1 for encoding in encoded[0])
    mass = float(np.mean(found.weight.sum(axis=1)))
    return found, {"positions": len(found.document), "of": tokens, "mass": mass}


def _followed(crossing: Crossing, branches: Branches, nodes: _Nodes, search: Search) -> list[tuple[np.ndarray, ...]]:
    """What a batch's positions come to, from all steps."""
    settled = []
    for number in range(search.steps):
        ids, weight = branches.likeliest(nodes.entry)
        new, (node, candidate) = _read(crossing, nodes, ids, weight, search, last=number == search.steps - 1)
        settled.append(new)
        if not len(node):
            break
        token = ids[node, candidate]
        entry = branches.grow(nodes.entry[node], token)
        held = [nodes.held[n] + crossing.piece(int(t)) for n, t in zip(node, token, strict=True)]
        nodes = _Nodes(entry, nodes.about[node], held, nodes.mass[node] * weight[node, candidate])
    return settled
