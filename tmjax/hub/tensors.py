"""Safetensors on disk: header index, lazy reads of whole tensors or slices, for single and sharded checkpoints.

The header is read with our own code so that a damaged file gives one clear line, and data with `pread` at the header's
offsets: a memory-mapped file would count fully in the peak memory of the process.
Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from tmjax.errors import CheckpointError, InputError, summarise

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000

#: safetensors dtype names to NumPy dtypes; everything else is refused: quantised formats, and F64, which JAX rounds.
DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, dtype, shape and absolute byte range [start, end)."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Parses and checks the header of one safetensors file; raises CheckpointError naming the file and the defect."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file (header of {length} bytes in a file of {size})"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a damaged safetensors header: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a damaged safetensors header: not a JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = {name: _entry(file, name, entry, data_start) for name, entry in header.items()}
    position = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            raise CheckpointError(f"{file}: tensor {info.name} starts at byte {info.start}, expected {position}")
        position = info.end
    if position != size:
        raise CheckpointError(
            f"{file} is truncated or has trailing bytes: {size} bytes, its header describes {position}"
        )
    return tensors


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate keys")
    return result


def _entry(file: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{file}: header entry of {name!r} is damaged") from None
    if not name.isprintable() or not isinstance(dtype_name, str):
        raise CheckpointError(f"{file}: header entry of {name!r} is damaged")
    numbers = (*shape, begin, end)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise CheckpointError(f"{file}: header entry of {name!r} is damaged")
    if dtype_name not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {dtype_name}; supported are {', '.join(DTYPES)}, not quantised ones"
        )
    dtype = DTYPES[dtype_name]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{file}: tensor {name} of shape {list(shape)} {dtype_name} has {end - begin} bytes")
    return TensorInfo(name, file, dtype, shape, data_start + begin, data_start + end)


class TensorIndex(Mapping[str, TensorInfo]):
    """All tensors of a checkpoint directory (single file or sharded with an index), read lazily."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._tensors: dict[str, TensorInfo] = {}
        index_file = self.directory / INDEX_NAME
        single = self.directory / SINGLE_NAME
        if single.is_file():  # before an index, as in transformers
            self._tensors = read_header(single)
        elif index_file.is_file():
            self._read_sharded(index_file)
        else:
            raise InputError(f"{self.directory} has neither {SINGLE_NAME} nor {INDEX_NAME}")

    def _read_sharded(self, index_file: Path) -> None:
        try:
            weight_map = json.loads(index_file.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)[
                "weight_map"
            ]
            shards = sorted(set(weight_map.values()))
            if not all(isinstance(shard, str) for shard in shards):
                raise ValueError("weight_map holds something that is not a file name")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index_file} is damaged: {error}") from None
        problems = []
        for shard in shards:
            if Path(shard).name != shard or shard in ("", ".."):
                raise CheckpointError(f"{index_file} names a shard outside its folder: {shard}")
            file = self.directory / shard
            if not file.is_file():
                problems.append(f"shard {shard} is missing")
                continue
            held = read_header(file)
            promised = {name for name, where in weight_map.items() if where == shard}
            problems += [f"{name} is not in {shard}" for name in sorted(promised - held.keys())]
            problems += [f"{name} is in {shard} but not in the index" for name in sorted(held.keys() - promised)]
            self._tensors.update(held)
        if problems:
            raise CheckpointError(f"{index_file}: {summarise(problems)}")

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or `tensor[index]`; only the rows that the first slice names are read from disk."""
        info = self._tensors[name]
        rows = index[0] if index and info.shape else slice(None)
        shape, start, count = info.shape, info.start, math.prod(info.shape)
        if rows != slice(None):
            first, stop, step = rows.indices(info.shape[0])
            stop = max(first, stop)
            if step != 1:
                raise ValueError(f"slices with a step are not read lazily: {rows}")
            row = math.prod(info.shape[1:])
            shape, start, count = (
                (stop - first, *info.shape[1:]),
                info.start + first * row * info.dtype.itemsize,
                (stop - first) * row,
            )
        buffer = np.empty(count, info.dtype)
        view = memoryview(buffer.view(np.uint8))
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(start)
            done = 0
            while done < len(view):
                got = stream.readinto(view[done:])
                if not got:
                    raise CheckpointError(f"{info.file} ended while reading {name}")
                done += got
        array = buffer.reshape(shape)
        return array[(slice(None), *index[1:])] if index[1:] else array
