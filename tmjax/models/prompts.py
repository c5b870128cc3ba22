"""Prompts of a batch as arrays; a beginning that several of them share is read once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tmjax.models.cache import Cache, empty_cache, extend, grown, prompt_tables, read_after, step_tables, stretches
from tmjax.models.spec import DecoderSpec
from tmjax.typing import Array, ArrayLike, Params, pytree_dataclass

#: Prompts and beginnings are padded to multiples of this.
PROMPT_TOKENS = 16


@pytree_dataclass
@dataclass(frozen=True)
class Beginnings:
    """What rows share: token ids [G, C], their number [G], the one of each row [B], rotary tables of C tokens."""

    ids: ArrayLike
    count: ArrayLike
    of_row: ArrayLike
    tables: tuple[ArrayLike, ArrayLike]


@pytree_dataclass
@dataclass(frozen=True)
class Prompts:
    """Rows: token ids after their beginnings [B, T], their number [B], their rotary tables; beginnings or None."""

    ids: ArrayLike
    count: ArrayLike
    tables: tuple[ArrayLike, ArrayLike]
    beginnings: Beginnings | None = None

    @property
    def slots(self) -> int:
        """Returns the number of slots that the prompts take in a cache."""
        return self.ids.shape[1] + (0 if self.beginnings is None else self.beginnings.ids.shape[1])


def read_prompts(
    spec: DecoderSpec, params: Params, prompts: Prompts, dtype: jnp.dtype, mesh: Mesh | None
) -> tuple[Array, Cache]:
    """Reads prompts; for use inside jit.

    Returns:
        The final normed state of each prompt's last token [B, embed], and a cache of the prompts.
    """
    shared = prompts.beginnings
    rows, tokens = prompts.ids.shape
    own = prompts.ids, prompts.count, prompts.tables
    if shared is None:
        hidden, cache = read_after(spec, params, empty_cache(spec, rows, 0, dtype), *own, mesh)
    else:
        cache = empty_cache(spec, shared.ids.shape[0], 0, dtype)
        _, cache = read_after(spec, params, cache, shared.ids, shared.count, shared.tables, mesh)
        hidden, cache = extend(spec, params, grown(cache.of_rows(shared.of_row, mesh), tokens), *own, mesh)
    last = jnp.take_along_axis(hidden, (prompts.count - 1)[:, None, None], axis=1)[:, 0]
    return last, cache


def make_prompts(
    spec: DecoderSpec,
    rows: Sequence[Sequence[int]],
    groups: Sequence[int] | None,
    *,
    size: int,
    tokens: int,
    multiple: int = 1,
) -> Prompts:
    """Lays prompts out as a batch.

    Args:
        spec: Architecture.
        rows: Token ids of every prompt.
        groups: The group of every prompt; what all prompts of a group begin with is read once. None: every prompt is
            read whole, as with rotary frequencies that depend on a prompt's length.
        size: Rows of the batch; further ones are padding.
        tokens: Whole prompts are padded to a multiple of so many tokens.
        multiple: The number of beginnings is a multiple of this.

    Returns:
        The prompts, arrays of the host.
    """
    ids, count = _padded(rows, size, tokens)
    begun = _beginnings(rows, groups) if groups is not None and not stretches(spec) else {}
    if max(map(len, begun.values()), default=0) < PROMPT_TOKENS:
        return Prompts(ids, count, prompt_tables(spec, count.tolist(), ids.shape[1]))
    number = {group: place for place, group in enumerate(begun)}
    of_row = np.zeros(size, np.int32)
    of_row[: len(rows)] = [number[group] for group in groups]
    shared, start = _padded(list(begun.values()), -(-len(begun) // multiple) * multiple, PROMPT_TOKENS)
    ids, count = _padded([row[len(begun[g]) :] for row, g in zip(rows, groups, strict=True)], size, PROMPT_TOKENS)
    tables = step_tables(spec, shared.shape[1] + ids.shape[1])
    place = start[of_row][:, None] + np.arange(ids.shape[1])
    read_once = tuple(table[:, None, : shared.shape[1]] for table in tables)
    beginnings = Beginnings(shared, start, of_row, read_once)
    return Prompts(ids, count, tuple(table[:, place] for table in tables), beginnings)


def placed(
    prompts: Prompts, batch: Callable[[Any], Any], whole: Callable[[Any], Any] = lambda tables: tables
) -> Prompts:
    """Returns the prompts with `batch` of each array that has a row per text, and `whole` of the tables."""
    shared = prompts.beginnings
    if shared is not None:
        shared = Beginnings(batch(shared.ids), batch(shared.count), batch(shared.of_row), whole(shared.tables))
    return Prompts(batch(prompts.ids), batch(prompts.count), whole(prompts.tables), shared)


def _beginnings(rows: Sequence[Sequence[int]], groups: Sequence[int]) -> dict[int, Sequence[int]]:
    """Returns what all rows of each group begin with; every row keeps a token of its own."""
    members: dict[int, list[Sequence[int]]] = {}
    for row, group in zip(rows, groups, strict=True):
        members.setdefault(group, []).append(row)
    result = {}
    for group, each in members.items():
        shortest = min(map(len, each))
        same = (np.asarray([row[:shortest] for row in each]) == np.asarray(each[0][:shortest])).all(axis=0)
        result[group] = each[0][: int(np.append(same[:-1], False).argmin())]
    return result


def _padded(rows: Sequence[Sequence[int]], size: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows [size, T] of tokens, padded on the right to a multiple of `tokens`, and their lengths [size]."""
    width = -(-max(map(len, rows)) // tokens) * tokens
    ids, count = np.zeros((size, width), np.int32), np.ones(size, np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)], count[number] = row, len(row)
    return ids, count
