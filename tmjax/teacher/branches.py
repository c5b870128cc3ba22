"""The likeliest next tokens of a source after texts and after continuations of them, each state computed once.

An entry of a batch is a token of a text (row x T + place) or a node, a token that follows an entry without being the
text's own next token; nodes are numbered after all tokens. Two ways to the same continuation are one entry.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tmjax.models.decoder import bind, known_logits
from tmjax.models.spec import DecoderSpec
from tmjax.models.tree import Nodes, read_nodes, read_texts
from tmjax.sharding.hosts import to_host
from tmjax.sharding.mesh import Layout, constrain
from tmjax.typing import Array, Params

#: Nodes of one text in a row of `Nodes`.
ROW_NODES = 8
#: Rows that are read together, many or few: two programs a shape of texts, and little padding.
NODE_ROWS = (64, 8)
#: States whose logits are made together, many or few.
STATES = (256, 32)
#: Classes that the vocabulary falls into when the likeliest tokens are looked for.
_CLASSES = 1024


def likeliest(logits_sv: Array, count: int) -> tuple[Array, Array]:
    """Returns ids and probabilities [S, count] of the likeliest tokens, the likeliest first.

    In two stages: the `count` largest of all lie in the `count` classes (token number modulo their number) whose
    largest are largest, so only these are sorted.
    """
    states, vocab = logits_sv.shape
    normaliser = jax.nn.logsumexp(logits_sv, axis=-1, keepdims=True)
    if vocab <= 4 * _CLASSES or count >= _CLASSES:
        best, ids = jax.lax.top_k(logits_sv, count)
        return ids, jnp.exp(best - normaliser)
    padded = jnp.pad(logits_sv, ((0, 0), (0, -vocab % _CLASSES)), constant_values=-jnp.inf)
    by_class = padded.reshape(states, -1, _CLASSES)
    chosen = jax.lax.top_k(by_class.max(axis=1), count)[1]
    in_chosen = jnp.take_along_axis(by_class, chosen[:, None, :], axis=2)
    best, place = jax.lax.top_k(in_chosen.reshape(states, -1), count)
    turn, column = place // count, place % count
    ids = turn * _CLASSES + jnp.take_along_axis(chosen, column, axis=1)
    return ids.astype(jnp.int32), jnp.exp(best - normaliser)


@functools.partial(jax.jit, static_argnames=("spec", "count", "mesh"))
def likeliest_after(
    spec: DecoderSpec, params: Params, states_se: Array, known_v: Array | None, count: int, mesh: Mesh | None
) -> tuple[Array, Array]:
    """`likeliest` after final normed states [S, embed]."""
    states_se = constrain(mesh, states_se, ("batch", None))
    return likeliest(known_logits(bind(spec, params).logits(states_se), known_v), count)


read_batch = functools.partial(jax.jit, static_argnames=("spec", "branches", "dtype", "mesh"))(read_texts)
read_branches = functools.partial(jax.jit, static_argnames=("spec", "mesh"))(read_nodes)


@dataclass(frozen=True)
class Reader:
    """A model, and the number of next tokens that are read from each distribution.

    Rows of the embedding that are no tokens (not `known`) have no probability; the rest is normalised without them.
    """

    spec: DecoderSpec
    params: Params
    candidates: int
    dtype: jnp.dtype
    layout: Layout
    known: np.ndarray | None = None


def _portions(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, size) of portions that cover `count` things: large ones while they are at least half full."""
    start, (large, small) = 0, sizes
    while start < count:
        size = large if count - start > large // 2 else small
        yield start, size
        start += size


def _filled(values: np.ndarray, size: int) -> np.ndarray:
    """Padded with zeros to `size` along the first axis."""
    return np.pad(values, [(0, size - len(values)), *[(0, 0)] * (values.ndim - 1)])


class Branches:
    """A batch of texts, padded to `shape`, with continuations of up to `depth` nodes one after the other."""

    def __init__(self, reader: Reader, texts: Sequence[Sequence[int]], shape: tuple[int, int], depth: int) -> None:
        self.reader = reader
        self._depth, self._slots = depth, shape[1]
        self._length = np.zeros(shape[0], np.int32)
        ids = np.zeros(shape, np.int32)
        for row, text in enumerate(texts):
            ids[row, : len(text)], self._length[row] = text, len(text)
        spec, mesh, place = reader.spec, reader.layout.mesh, reader.layout.place_batch
        read = (place(ids), place(self._length), depth, reader.dtype, mesh)
        hidden, self._keys, self._values = read_batch(spec, reader.params, *read)
        self._tokens = ids.reshape(-1)
        self._states = to_host(hidden).reshape(-1, spec.hidden)
        entries = len(self._tokens)
        # Of every entry: its text, how many of its tokens are before it or are it, the nodes that are.
        self._text = np.repeat(np.arange(shape[0], dtype=np.int32), shape[1])
        self._prefix = np.tile(np.arange(1, shape[1] + 1, dtype=np.int32), shape[0])
        self._path: list[tuple[int, ...]] = [()] * entries
        self._child: dict[tuple[int, int], int] = {}
        self._first_node = entries
        # Keys and values of nodes, and which of them a node has.
        self._made: list[tuple[np.ndarray, np.ndarray]] = []
        self._where: list[tuple[int, int, int]] = []
        self._answers: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def likeliest(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and probabilities [n, candidates] of the likeliest tokens after these entries."""
        reader = self.reader
        fresh = np.asarray([e for e in np.unique(entries).tolist() if e not in self._answers], np.int64)
        for start, size in _portions(len(fresh), self._multiples(STATES)):
            part = fresh[start : start + size]
            states = reader.layout.place_batch(_filled(self._states[part], size))
            best = likeliest_after(
                reader.spec, reader.params, states, reader.known, reader.candidates, reader.layout.mesh
            )
            for entry, *answer in zip(part.tolist(), *map(np.asarray, to_host(best)), strict=False):
                self._answers[entry] = tuple(answer)
        both = [self._answers[entry] for entry in entries.tolist()]
        return np.stack([ids for ids, _ in both]), np.stack([weight for _, weight in both])

    def grow(self, parents: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Returns the entries that follow `parents` by these tokens; new ones are read."""
        entries = np.empty(len(parents), np.int64)
        new: list[tuple[int, int]] = []
        for number, (parent, token) in enumerate(zip(parents.tolist(), tokens.tolist(), strict=True)):
            on_text = parent < self._first_node and self._prefix[parent] < self._length[self._text[parent]]
            if on_text and self._tokens[parent + 1] == token:
                entries[number] = parent + 1
                continue
            entry = self._child.get((parent, token))
            if entry is None:
                entry = self._child[parent, token] = len(self._path) + len(new)
                new.append((parent, token))
            entries[number] = entry
        if new:
            self._read(np.asarray([p for p, _ in new]), np.asarray([t for _, t in new], np.int32))
        return entries

    def _multiples(self, sizes: Sequence[int]) -> list[int]:
        multiple = self.reader.layout.batch_multiple
        return [-(-size // multiple) * multiple for size in sizes]

    def _read(self, parents: np.ndarray, tokens: np.ndarray) -> None:
        """Reads new nodes: their states, keys and values are kept."""
        first = len(self._path)
        for number, parent in enumerate(parents.tolist()):
            self._path.append((*self._path[parent], first + number))
        self._tokens = np.concatenate([self._tokens, tokens])
        self._text = np.concatenate([self._text, self._text[parents]])
        self._prefix = np.concatenate([self._prefix, self._prefix[parents]])
        fresh = np.empty((len(tokens), self._states.shape[1]), self._states.dtype)
        self._states = np.concatenate([self._states, fresh])
        self._where += [(0, 0, 0)] * len(tokens)
        order = first + np.argsort(self._text[first:], kind="stable")
        rows = []  # entries of a row: at most ROW_NODES of one text
        for entry in order.tolist():
            if not rows or len(rows[-1]) == ROW_NODES or self._text[rows[-1][0]] != self._text[entry]:
                rows.append([])
            rows[-1].append(entry)
        for start, size in _portions(len(rows), self._multiples(NODE_ROWS)):
            self._read_rows(rows[start : start + size], size)

    def _read_rows(self, rows: list[list[int]], size: int) -> None:
        reader, spec = self.reader, self.reader.spec
        others = max(self._depth - 1, 0)
        shape = (size, ROW_NODES)
        ids, prefix, count = (np.zeros(shape, np.int32) for _ in range(3))
        text = np.zeros(size, np.int32)
        before = np.zeros((2, size, spec.layers, ROW_NODES, others, spec.kv_heads, spec.head_dim), self._keys.dtype)
        for row, entries in enumerate(rows):
            text[row] = self._text[entries[0]]
            for column, entry in enumerate(entries):
                path = self._path[entry][:-1]
                ids[row, column], prefix[row, column], count[row, column] = (
                    self._tokens[entry],
                    self._prefix[entry],
                    len(path),
                )
                for number, node in enumerate(path):
                    part, *at = self._where[node - self._first_node]
                    for side in (0, 1):
                        before[side, row, :, column, number] = self._made[part][side][:, *at]
        place = reader.layout.place_batch
        nodes = Nodes(*map(place, (ids, text, prefix, count, *before)))
        states, *made = to_host(read_branches(spec, reader.params, self._keys, self._values, nodes, reader.layout.mesh))
        self._made.append(tuple(made) if others else ())
        for row, entries in enumerate(rows):
            for column, entry in enumerate(entries):
                self._states[entry] = states[row, column]
                self._where[entry - self._first_node] = (len(self._made) - 1, row, column)
