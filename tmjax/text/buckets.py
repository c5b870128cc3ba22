"""Batches bucketed by length: few shapes, so few compilations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SMALLEST = 32


def bucket_length(tokens: int) -> int:
    """The padded length of a sequence: 32, 48, 64, 96, 128, ... (two sizes an octave, at most a third padding)."""
    size = SMALLEST
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


@dataclass(frozen=True)
class Batch:
    """Document numbers of one batch, and the shape [size, tokens] that all batches of its bucket share."""

    documents: tuple[int, ...]
    size: int
    tokens: int


def bucketed(lengths: Sequence[int], *, batch_tokens: int, multiple: int = 1) -> Iterator[Batch]:
    """Batches of documents of similar length, at most `batch_tokens` padded tokens each; one shape per bucket.

    `size` is a multiple of `multiple` (the number of devices that share a batch).
    """
    buckets: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        buckets.setdefault(bucket_length(length), []).append(number)
    for tokens, members in sorted(buckets.items()):
        size = max(1, min(batch_tokens // tokens, len(members)))
        padded = -(-size // multiple) * multiple
        for start in range(0, len(members), size):
            yield Batch(tuple(members[start : start + size]), padded, tokens)
