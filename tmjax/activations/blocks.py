"""Streaming: both models read the same documents, and paired rows leave in blocks of one shape; nothing is stored."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tmjax.activations.capture import CaptureOptions, pooled_batches, require_finite, require_readable
from tmjax.errors import RowMismatchError
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.hosts import to_host
from tmjax.text.buckets import Batch, bucket_length
from tmjax.text.rows import Rows, TokenisedDocument
from tmjax.typing import Params

#: A model, its parameters and the documents as it reads them.
Reader = tuple[DecoderSpec, Params, Sequence[TokenisedDocument]]
Values = dict[str, np.ndarray]
Block = tuple[Values, Values, np.ndarray]
#: Tokens of a group of documents, in batches: more leave fewer batches half empty, fewer take less memory.
GROUP_BATCHES = 4


def _groups(documents: Sequence[Sequence[TokenisedDocument]], limits: Sequence[int]) -> list[list[int]]:
    """Consecutive documents with rows, in groups of at most GROUP_BATCHES batches of tokens for either model."""
    groups: list[list[int]] = []
    tokens = np.zeros(len(limits), np.int64)
    for number, read in enumerate(zip(*documents, strict=True)):
        if not read[0].rows:
            continue
        lengths = np.asarray([len(document.ids) for document in read])
        if not groups or (tokens + lengths > GROUP_BATCHES * np.asarray(limits)).any():
            groups.append([])
            tokens[:] = 0
        groups[-1].append(number)
        tokens += lengths
    return groups


def _shapes(documents: Sequence[TokenisedDocument], limit: int, multiple: int) -> dict[int, tuple[int, int]]:
    """For each bucket of padded tokens, the number of documents and the rows per document of all its batches.

    They come from all documents, so groups add no shapes. A batch may be filled up with shorter documents; their
    rows count too.
    """
    rows: dict[int, list[int]] = {}
    for document in documents:
        if document.rows:
            rows.setdefault(bucket_length(len(document.ids)), []).append(len(document.rows))
    shapes, members, widest = {}, 0, 1
    for tokens, counts in sorted(rows.items()):
        members, widest = members + len(counts), max(widest, *counts)
        size = max(1, min(limit // tokens, members))
        shapes[tokens] = (-(-size // multiple) * multiple, widest)
    return shapes


def _batches(
    group: Sequence[int], documents: Sequence[TokenisedDocument], shapes: dict[int, tuple[int, int]]
) -> list[tuple[Batch, int]]:
    """Batches of a group, longest documents first; shorter documents fill the empty slots of a long bucket."""
    left = sorted(group, key=lambda number: len(documents[number].ids), reverse=True)
    batches = []
    while left:
        tokens = bucket_length(len(documents[left[0]].ids))
        size, rows = shapes[tokens]
        batches.append((Batch(tuple(left[:size]), size, tokens), rows))
        left = left[size:]
    return batches


@dataclass(frozen=True)
class _Side:
    """One model's part: per group of documents, the batches (with rows per document) that cover it."""

    reader: Reader
    groups: list[list[int]]
    batches: list[list[tuple[Batch, int]]]

    def read(self, number: int, tick: Callable[[], None], **how: Any) -> Values:
        """Runs the model over one group and returns its rows `[layer, row, unit]` in order.

        `tick` is called after each batch.
        """
        spec, params, documents = self.reader
        counts = [len(documents[n].rows) for n in self.groups[number]]
        ends = dict(zip(self.groups[number], np.cumsum(counts), strict=True))
        activations: Values = {}
        for batch, captured in pooled_batches(spec, params, documents, self.batches[number], **how):
            for site, values in to_host(captured).items():
                require_finite(site, values)
                if site not in activations:
                    activations[site] = np.empty((len(values), sum(counts), values.shape[-1]), np.float32)
                for slot, n in enumerate(batch.documents):
                    count = len(documents[n].rows)
                    activations[site][:, ends[n] - count : ends[n]] = values[:, slot, :count]
            tick()
        return activations


def _place(blocks: Sequence[Values], at: int, piece: Sequence[Values], first: int, count: int) -> None:
    for block, values in zip(blocks, piece, strict=True):
        for site in values:
            block[site][:, at : at + count] = values[site][:, first : first + count]


def _cut(pieces: Iterator[Sequence[Values]], block_rows: int) -> Iterator[Block]:
    """Cuts pairs of `[layer, row, unit]` arrays of any number of rows into blocks of `block_rows`."""
    blocks: list[Values] = []
    filled = 0
    for piece in pieces:
        there = next(iter(piece[0].values())).shape[1]
        taken = 0
        while taken < there:
            if not blocks:
                blocks = [
                    {site: np.zeros((len(x), block_rows, x.shape[2]), x.dtype) for site, x in values.items()}
                    for values in piece
                ]
            count = min(block_rows - filled, there - taken)
            _place(blocks, filled, piece, taken, count)
            filled, taken = filled + count, taken + count
            if filled == block_rows:
                yield blocks[0], blocks[1], np.ones(block_rows, bool)
                blocks, filled = [], 0
        del piece  # or it would be held while the next one is read
    if filled:
        yield blocks[0], blocks[1], np.arange(block_rows) < filled


def _require_rows(name: str, documents: Sequence[TokenisedDocument], rows: Rows) -> None:
    counts = [len(document.rows) for document in documents]
    named = np.bincount(rows.document, minlength=len(counts))
    if len(named) > len(counts):
        raise RowMismatchError(f"{name} has {len(counts)} documents, the rows name document {len(named) - 1}")
    different = np.nonzero(named != counts)[0]
    if len(different):
        n = different[0]
        raise RowMismatchError(f"{name} document {n} has {counts[n]} pieces of text, the rows name {named[n]}")


def paired_blocks(
    target: Reader,
    source: Reader,
    rows: Rows,
    options: CaptureOptions | None = None,
    *,
    block_rows: int = 512,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Block]:
    """Runs both models over the documents and yields their pooled activations in blocks of rows.

    Documents are read in groups of at most GROUP_BATCHES batches; only one group and one block are in memory. There is
    one compilation per model and bucket of lengths.

    Args:
        target: (spec, params, documents) of the target.
        source: The same of the source, with the documents of the same `pair_rows`.
        rows: Pieces of text that are the rows.
        options: Sites, batches and devices, as for `capture`.
        block_rows: Rows of a block.
        progress: Called with the batches done and the number of both models' batches.

    Returns:
        An iterator of blocks ({site: [L, block_rows, n]}, {site: [M, block_rows, k]}, mask [block_rows]): float32,
        fresh arrays, in the order of `rows`. The last block is padded with zeros where the mask (bool) is False.

    Raises:
        RowMismatchError: The documents are not those of `rows`; raised before anything runs.
        InputError: A site or token id is unknown; raised before anything runs.
        NonFiniteError: An activation is NaN or infinite; raised while it runs.
    """
    options = CaptureOptions() if options is None else options
    readers, sites, layout = (target, source), options.sites, options.layout
    if sites is None:
        sites = tuple(site for site in target[0].sites if site in source[0].sites)
    for name, (spec, _, documents) in zip(("target", "source"), readers, strict=True):
        require_readable(spec, documents, sites)
        _require_rows(name, documents, rows)
    limits = [options.batch_limit(spec, sites, documents) for spec, _, documents in readers]
    groups = _groups([documents for _, _, documents in readers], limits)
    sides = []
    for reader, limit in zip(readers, limits, strict=True):
        shapes = _shapes(reader[2], limit, layout.batch_multiple)
        sides.append(_Side(reader, groups, [_batches(group, reader[2], shapes) for group in groups]))
    total = sum(len(batches) for side in sides for batches in side.batches)
    done = itertools.count(1)

    def tick() -> None:
        progress(next(done), total)

    def pieces() -> Iterator[Sequence[Values]]:
        for number in range(len(groups)):
            yield [side.read(number, tick, sites=sites, dtype=options.dtype, layout=layout) for side in sides]

    return _cut(pieces(), block_rows)
