"""Arrays of an orbax checkpoint, written and read in parts, which orbax itself does only whole.

Orbax lets a type say how it is stored (`ocp.type_handlers.TypeHandler`): orbax makes directory, metadata and commit,
the handler gets the tensorstore specification of each array and fills it. What results is what orbax writes for NumPy
arrays, and every orbax reads it. https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpoint_format.html
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from tmjax.errors import CheckpointError

#: Largest chunk, and limit of the bytes that wait to be written beside it: bounds the memory of writing.
CHUNK_BYTES = 2**24
#: Upper bound of a chunk's overhead in tensorstore's cache, which keeps no entry larger than its limit.
_ENTRY_BYTES = 2**20


class _Parts:
    """An array to be written chunk by chunk, of some rows of a layer (or of an array that is not stacked)."""

    def __init__(self, value: Any, *, stacked: bool) -> None:
        self.value, self.shape, self.dtype = value, tuple(value.shape), np.dtype(value.dtype)
        first, *rest = self.shape[stacked:] or (1,)
        max_rows = max(1, CHUNK_BYTES // (math.prod(rest) * self.dtype.itemsize))
        # As even as they come rather than dividing the rows: vocabularies can be prime.
        rows = math.ceil(first / math.ceil(first / max_rows))
        self.chunk = ((1,) * stacked + (rows, *rest))[: len(self.shape)]

    def __iter__(self) -> Iterator[tuple[slice, ...]]:
        """The slices of every chunk."""
        starts = [range(0, size, step) for size, step in zip(self.shape, self.chunk, strict=True)]
        for corner in itertools.product(*starts):
            yield tuple(
                slice(start, min(start + step, size))
                for start, step, size in zip(corner, self.chunk, self.shape, strict=True)
            )


class _Handler(ocp.type_handlers.TypeHandler):
    """Writes `_Parts` as orbax writes NumPy arrays, and restores open tensorstores instead of arrays."""

    def typestr(self) -> str:
        """The type under which any orbax restores what was written."""
        return "np.ndarray"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        """Never asked for: only `save_arrays` and `open_arrays` use this handler."""
        raise NotImplementedError

    async def serialize(
        self, values: Sequence[_Parts], infos: Sequence[Any], args: Sequence[ocp.SaveArgs] | None = None
    ) -> Sequence[Any]:
        """Writes every chunk in turn; all is written on return."""
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=value.shape,
                local_shape=value.shape,
                dtype=value.dtype,
                process_index=0,
            )
            spec["metadata"]["chunks"] = value.chunk
            # Flushing every chunk to the disk takes most of the time; a directory is valid once it has its name.
            context = ts.Context({"file_io_sync": False}, parent=info.ts_context)
            store = await ts.open(ts.Spec(spec), create=True, open=True, context=context)
            pending: list[tuple[int, Any]] = []
            try:
                for slices in value:
                    part = np.asarray(value.value[slices])
                    while pending and sum(size for size, _ in pending) + part.nbytes > CHUNK_BYTES:
                        await pending.pop(0)[1]
                    write = store[slices].write(part, can_reference_source_data_indefinitely=True)
                    pending.append((part.nbytes, write))
            finally:  # also when reading has failed: nothing may be written to a directory that the caller then deletes
                for _, write in pending:
                    await write
        return []

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[ts.TensorStore]:
        """Opens every array."""
        specs = [ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint) for info in infos]
        return [
            await ts.open(ts.Spec(spec), open=True, context=info.ts_context)
            for spec, info in zip(specs, infos, strict=True)
        ]


def _checkpointer() -> ocp.Checkpointer:
    # That of JAX's arrays is never used; orbax warns of a registry without it.
    handlers = ocp.type_handlers.create_type_handler_registry(
        (_Parts, _Handler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # Compression saves a tenth of float32, a fifth of bfloat16, and makes reading several times slower.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False))


def save_arrays(directory: Path, arrays: Mapping[str, Any], stacked: Collection[str]) -> None:
    """Writes an orbax checkpoint of arrays (JAX's, NumPy's or `LazyArray`) by name; `directory` must not exist.

    They are read and written in chunks of whole rows, of `CHUNK_BYTES` at most unless a row is larger. In arrays named
    in `stacked`, whose first axis is the layer, a chunk lies in one layer.
    """
    parts = {name: _Parts(value, stacked=name in stacked) for name, value in arrays.items()}
    with _checkpointer() as checkpointer:
        checkpointer.save(Path(directory).absolute(), args=ocp.args.PyTreeSave(parts))


def open_arrays(
    directory: Path, described: Mapping[str, tuple[tuple[int, ...], np.dtype]], layered: Mapping[str, str]
) -> dict[str, Callable[[tuple[slice, ...]], np.ndarray]]:
    """Opens every array of an orbax checkpoint, as a function that reads slices of it; reads no data yet.

    Only chunks that the slices touch are read. `layered` names the arrays whose first axis is the layer. Where their
    chunks span layers, as orbax itself and earlier versions write them, the chunks of arrays with the same value in
    `layered` are cached until others are read, so that layers read in turn are not decoded again and again. Raises
    CheckpointError, now or while reading, for arrays that are damaged or not as described.
    """
    directory = Path(directory).absolute()

    def tried(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (ValueError, OSError, KeyError, NotImplementedError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{directory} is damaged: {reason}") from None

    def restore() -> dict[str, ts.TensorStore]:
        restore_args = {name: ocp.RestoreArgs(restore_type=_Parts) for name in described}
        with _checkpointer() as checkpointer:
            return checkpointer.restore(directory, args=ocp.args.PyTreeRestore(restore_args=restore_args))

    stores = tried(restore)
    kept: dict[str, int] = {}
    for name, (shape, dtype) in described.items():
        store = stores.get(name)
        if store is None or store.shape != shape or store.dtype.numpy_dtype != dtype:
            stored = "missing" if store is None else f"{store.dtype.numpy_dtype} {list(store.shape)}"
            raise CheckpointError(f"{directory}: parameter {name} is {stored}, expected {dtype} {list(shape)}")
        if name in layered and store.chunk_layout.read_chunk.shape[0] > 1:
            kept[layered[name]] = kept.get(layered[name], 0) + store.size * dtype.itemsize + _ENTRY_BYTES
    if kept:
        context = ts.Context({"cache_pool": {"total_bytes_limit": max(kept.values())}})
        stores = {
            name: tried(lambda store=store: ts.open(store.spec(), open=True, context=context).result())
            for name, store in stores.items()
        }

    def reader(store: ts.TensorStore) -> Callable[[tuple[slice, ...]], np.ndarray]:
        def read(slices: tuple[slice, ...]) -> np.ndarray:
            # In NumPy's sense, where a slice may end past the array or be open.
            bounds = [part.indices(size)[:2] for part, size in zip(slices, store.shape, strict=True)]
            return tried(store[tuple(slice(start, max(start, stop)) for start, stop in bounds)].read().result)

        return read

    return {name: reader(stores[name]) for name in described}
