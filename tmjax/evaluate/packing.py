"""Texts packed for scoring: chunks of one shape, so that one program scores any number of them.

Against the padded batches of `tmjax.evaluate.bits` there is next to no padding and the beginnings that texts share are
computed once; the scores are the same up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.models.decoder import bind
from tmjax.models.packed import Packed, packed_hidden
from tmjax.models.rotary import rotary_tables
from tmjax.models.spec import DecoderSpec
from tmjax.text.buckets import bucket_length
from tmjax.typing import Array, Params

#: Largest number of lengths that attention is compiled for.
LENGTHS = 6
#: Logits are made for about this many entries (node x vocabulary) at a time, which stay in a processor's cache; but not
#: for fewer nodes than make a matrix product worth its while.
LOGIT_ENTRIES = 2**20
LOGIT_NODES = 256


def text_lengths(tokens: Sequence[int], max_lengths: int = LENGTHS) -> list[int]:
    """Chooses at most `max_lengths` padded lengths, ascending, that minimise the padded entries T^2 of all texts."""
    step = 8
    while max(tokens) > 256 * step:
        step *= 2
    rounded, count = np.unique([-(-n // step) * step for n in tokens], return_counts=True)
    below = np.concatenate([[0], np.cumsum(count)])
    # best[j]: cost of the texts of the first j lengths if the j-th is chosen last, and the chosen lengths.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *[(float("inf"), ())] * len(rounded)]
    finished = []
    for _ in range(min(max_lengths, len(rounded))):
        row: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for j, length in enumerate(rounded, 1):
            cost, before = min((best[i][0] + float(below[j] - below[i]) * float(length) ** 2, i) for i in range(j))
            row.append((cost, (*best[before][1], int(length))))
        best = row
        finished.append(row[-1])
    return list(min(finished, key=lambda item: item[0])[1])


@dataclass(frozen=True)
class Chunks:
    """Texts in chunks of one shape: `Packed` with a leading axis C; `owners` [C, B], all lengths: text, -1 for none."""

    packed: Packed
    owners: np.ndarray

    def sums(self, values_cb: np.ndarray, texts: int) -> np.ndarray:
        """Gathers values [..., C, B] of the chunks' rows into one per text, [..., texts]."""
        occupied = self.owners >= 0
        result = np.zeros((*values_cb.shape[:-2], texts))
        result[..., self.owners[occupied]] = values_cb[..., occupied]
        return result


class _Nodes:
    """The nodes of one chunk while it is filled."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int, int], int] = {}
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.runs: list[int] = []

    def add(self, tokens: Sequence[int], run: int) -> list[int]:
        """Node of every token of a text; `run` is the length that rotary embeddings take it to have."""
        node, path = -1, []
        for position, token in enumerate(tokens):
            key = (node, token, run)
            node = self.known.setdefault(key, len(self.ids))
            if node == len(self.ids):
                self.ids.append(token)
                self.positions.append(position)
                self.runs.append(run)
            path.append(node)
        return path


def _even(texts: Sequence[Sequence[int]], members: np.ndarray, chunk_tokens: int) -> list[list[list[int]]]:
    """Numbers of the texts of every chunk and length, each chunk with as many of a length as the others."""
    inputs = [len(ids) - 1 for ids in texts]
    count = max(1, round(sum(inputs) / max(chunk_tokens, *inputs)))
    load = [0] * count
    shares: list[list[list[int]]] = [[] for _ in range(count)]
    for number in range(max(members) + 1):
        ordered = sorted(np.nonzero(members == number)[0].tolist(), key=lambda text: tuple(texts[text]))
        parts = [part.tolist() for part in np.array_split(np.asarray(ordered, int), count)]
        parts.sort(key=lambda part: -sum(inputs[text] for text in part))
        for chunk, part in zip(sorted(range(count), key=lambda c: load[c]), parts, strict=True):
            load[chunk] += sum(inputs[text] for text in part)
            shares[chunk].append(part)
    return shares


def _alike(texts: Sequence[Sequence[int]], members: np.ndarray, chunk_tokens: int) -> list[list[list[int]]]:
    """The same in the order of the tokens: a chunk is full when its texts have `chunk_tokens` beginnings."""
    shares: list[list[list[int]]] = []
    room, before = 0, ()
    for text in sorted(range(len(texts)), key=lambda text: tuple(texts[text])):
        ids = tuple(texts[text][:-1])
        shared = next((i for i, pair in enumerate(zip(ids, before, strict=False)) if pair[0] != pair[1]), None)
        new = len(ids) - (min(len(ids), len(before)) if shared is None else shared)
        if not shares or new > room:
            shares.append([[] for _ in range(max(members) + 1)])
            room, new = chunk_tokens, len(ids)
        room, before = room - new, ids
        shares[-1][members[text]].append(text)
    return shares


def _tails(
    texts: Sequence[Sequence[int]], shares: list[list[list[int]]], lengths: Sequence[int]
) -> tuple[list[list[list[int]]], list[int], list[int]]:
    """Splits the texts of each length by whether a text before them in the chunk begins alike for most of it.

    Of these only the end asks: shares, lengths, and numbers of tokens that ask.
    """
    new: dict[int, int] = {}
    for share in shares:
        before: tuple[int, ...] = ()
        for text in sorted((text for part in share for text in part), key=lambda text: tuple(texts[text])):
            ids = tuple(texts[text][:-1])
            shared = next((i for i, pair in enumerate(zip(ids, before, strict=False)) if pair[0] != pair[1]), None)
            new[text] = len(ids) - (min(len(ids), len(before)) if shared is None else shared)
            before = ids
    split: list[list[list[int]]] = [[] for _ in shares]
    all_lengths, asking = [], []
    for number, length in enumerate(lengths):
        tails = [new[text] for share in shares for text in share[number] if new[text] <= length // 2]
        longest = -(-max(tails, default=0) // 8) * 8
        ends = [[text for text in share[number] if new[text] <= longest <= length // 2] for share in shares]
        whole = [[text for text in share[number] if text not in end] for share, end in zip(shares, ends, strict=True)]
        for kind, size in ((whole, length), (ends, longest)):
            if any(kind):
                all_lengths.append(length)
                asking.append(size)
                for chunk, part in zip(split, kind, strict=True):
                    chunk.append(part)
    return split, all_lengths, asking


def pack(
    spec: DecoderSpec, texts: Sequence[Sequence[int]], *, chunk_tokens: int, alike: bool = False, multiple: int = 1
) -> Chunks:
    """Packs texts (token ids, at least two each) into chunks of about `chunk_tokens` tokens, or of the longest text.

    Texts of one length are spread over the chunks, those that begin alike next to each other; with `alike`, all that
    begin alike are in one chunk, whatever their lengths. The number of chunks is a multiple of `multiple`.
    """
    inputs = [len(ids) - 1 for ids in texts]
    # Rotary scalings `dynamic` and `longrope` depend on the length of a run, padding included: as `bucketed` pads it.
    # With `alike`, where texts share prefixes, it is a text's own length, or the smallest length that matters.
    turns = [rotary.original_positions for rotary in spec.rotaries if rotary.scaling in ("dynamic", "longrope")]
    own = [max(length, min(turns)) if turns and alike else bucket_length(length + 1) - 1 for length in inputs]
    runs = own if turns else [max(inputs)] * len(inputs)
    lengths = text_lengths(inputs)
    members = np.searchsorted(lengths, inputs)
    shares = (_alike if alike else _even)(texts, members, chunk_tokens)
    asking = list(lengths)
    if alike:
        shares, lengths, asking = _tails(texts, shares, lengths)
    shares += [[[] for _ in lengths] for _ in range(-len(shares) % multiple)]
    count = len(shares)
    rows = [max(len(share[number]) for share in shares) for number in range(len(lengths))]
    filled = [_Nodes() for _ in range(count)]
    nodes = [np.zeros((count, size, length), np.int32) for size, length in zip(rows, lengths, strict=True)]
    ask = [np.zeros((count, size, length), np.int32) for size, length in zip(rows, asking, strict=True)]
    first = [np.zeros((count, size), np.int32) for size in rows]
    labels = [np.full_like(array, -1) for array in nodes]
    owners = [np.full((count, size), -1) for size in rows]
    for chunk, share in enumerate(shares):
        for number, part in enumerate(share):
            for row, text in enumerate(part):
                path = filled[chunk].add(texts[text][:-1], runs[text])
                start = max(0, len(path) - asking[number])
                nodes[number][chunk, row, : len(path)], first[number][chunk, row] = path, start
                ask[number][chunk, row, : len(path) - start] = path[start:]
                labels[number][chunk, row, : inputs[text]] = texts[text][1:]
                owners[number][chunk, row] = text
    size = -(-max(len(chunk.ids) for chunk in filled) // 8) * 8
    back = np.zeros((count, size), np.int32)
    for chunk in range(count):
        start = 0
        for node, begun, owner in zip(ask, first, owners, strict=True):
            taken = np.asarray([inputs[text] if text >= 0 else 0 for text in owner[chunk]]) - begun[chunk]
            real = np.nonzero(np.arange(node.shape[2]) < taken[:, None])
            back[chunk, node[chunk][real]] = start + np.ravel_multi_index(real, node.shape[1:])
            start += node[chunk].size

    def stacked(name: str) -> np.ndarray:
        arrays = [np.asarray(getattr(chunk, name), np.int32) for chunk in filled]
        return np.stack([np.pad(values, (0, size - len(values))) for values in arrays])

    ids, positions, run = stacked("ids"), stacked("positions"), stacked("runs")
    cos, sin = _tables(spec, positions, run, sorted(set(runs)))
    indices = (back, tuple(nodes), tuple(labels), tuple(ask), tuple(first))
    return Chunks(Packed(ids, positions, cos, sin, *indices), np.concatenate(owners, axis=1))


def _tables(
    spec: DecoderSpec, positions_cn: np.ndarray, runs_cn: np.ndarray, runs: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Computes cosines and sines [C, rotary, N, planes] of nodes at `positions_cn` in runs of `runs_cn` tokens."""
    result: list[np.ndarray] = []
    for run in runs:
        pair = [np.asarray(table) for table in rotary_tables(spec.rotaries, spec.head_dim, jnp.arange(run))]
        chosen = [np.moveaxis(table[:, np.minimum(positions_cn, run - 1)], 0, 1) for table in pair]
        in_run = (runs_cn == run)[:, None, :, None]
        result = chosen if not result else [np.where(in_run, new, old) for new, old in zip(chosen, result, strict=True)]
    return result[0], result[1]


def packed_nll(spec: DecoderSpec, params: Params, packed: Packed, dtype: jnp.dtype) -> Array:
    """Sum over each text of a chunk of -ln p(token | tokens before), all but its first token: [B] float32.

    B counts the texts of all lengths; a row without a text gives 0.
    """
    model = bind(spec, params)
    hidden = packed_hidden(model, packed, dtype)
    nodes = hidden.shape[0]
    blocks = -(-nodes // max(LOGIT_NODES, LOGIT_ENTRIES // spec.vocab))
    at_once = -(-nodes // blocks)
    padded = jnp.pad(hidden, ((0, blocks * at_once - nodes), (0, 0))).reshape(blocks, at_once, -1)
    normaliser = jax.lax.map(lambda states: jax.nn.logsumexp(model.logits(states), axis=-1), padded).reshape(-1)
    sums = []
    for text_bt, label_bt in zip(packed.texts, packed.labels, strict=True):
        nll = normaliser[text_bt] - model.logits_of(hidden[text_bt], jnp.maximum(label_bt, 0))
        sums.append(jnp.sum(jnp.where(label_bt >= 0, nll, 0.0), axis=1))
    return jnp.concatenate(sums)
