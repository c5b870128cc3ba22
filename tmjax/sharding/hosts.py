"""Several processes that run one program (JAX's multi-controller runtime): who is first, agreeing, fetching arrays.

Every process calls the same functions in the same order. In a job of one process all of this is local and free.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tmjax.errors import InputError, TmjaxError, by_name
from tmjax.typing import Array

T = TypeVar("T")


def count() -> int:
    """Number of processes of the job."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is the process that writes, prints and decides."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come here."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(value: T) -> T:
    """The first process's value (of JSON kinds), on every process."""
    if count() == 1:
        return value
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(raw))))
    padded = np.zeros(size, np.uint8)
    padded[: min(size, len(raw))] = raw[:size]
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)))


def everyone(value: Any) -> list[Any]:
    """Every process's value (of JSON kinds), in the order of the processes."""
    if count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(raw)))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(raw)] = raw
    rows = np.asarray(multihost_utils.process_allgather(padded), np.uint8).reshape(count(), -1)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def together(work: Callable[[], T]) -> T:
    """Runs `work` and returns its result; if it raises a TmjaxError on any process, all raise the first one.

    For work without collectives, such as reading files, that can fail on one host alone.
    """
    result, failure, own = None, None, None
    try:
        result = work()
    except TmjaxError as error:
        failure, own = [type(error).__name__, str(error)], error
    failures = everyone(failure)
    if own is not None and (count() == 1 or failures[0] == failure):
        raise own
    for process, failed in enumerate(failures):
        if failed is not None:
            kind, message = failed
            raise by_name(kind)(f"process {process}: {message}" if process else message)
    return result


def require_same(name: str, value: Any) -> None:
    """Raises InputError with `name` if a process has another value (of JSON kinds) than the first."""
    for process, other in enumerate(everyone(value)):
        if other != agree(value):
            raise InputError(f"process {process} has other {name} than process 0; give every process the same")


def to_host(tree: Any) -> Any:
    """A pytree of arrays as NumPy arrays, whole on every process: of arrays that other hosts hold parts of too."""

    def fetch(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    jax.tree.map(_start_copy, tree)
    return jax.tree.map(fetch, tree)


def _start_copy(x: Any) -> None:
    if isinstance(x, jax.Array) and x.is_fully_addressable:
        x.copy_to_host_async()


def local_parts(x: Array, axis: int) -> Iterator[tuple[int, np.ndarray]]:
    """The parts of an array, split along `axis` alone, that are this process's to write: (start, values).

    All processes' parts together are the whole array, each entry once.
    """
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index[axis].start or 0, np.asarray(shard.data)
