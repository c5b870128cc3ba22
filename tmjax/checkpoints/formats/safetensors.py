"""Safetensors on disk: header index, lazy reads of whole tensors or slices, for single and sharded checkpoints.

The header is read with our own code so that a damaged file gives one clear line, and data with `pread` at the header's
offsets: a memory-mapped file would count fully in the peak memory of the process.
Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

import abc
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import ml_dtypes
import numpy as np

from tmjax.errors import CheckpointError, InputError, summarise

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
#: First bytes of the pointer that git-lfs leaves in the place of a file that was not fetched.
LFS_POINTER = b"version "
#: What `Weights.blocks` gives at a time, and `all_finite` looks at: little enough to stay in a processor's cache.
BLOCK_BYTES = 2**20

#: safetensors dtype names to NumPy dtypes; everything else is refused: quantised formats, and F64, which JAX rounds.
DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
#: The same by the names that configs and command lines use: float32, float16, bfloat16.
DTYPES_BY_NAME: Mapping[str, np.dtype] = {dtype.name: dtype for dtype in DTYPES.values()}
#: Numbers that stand for others by a scale (see `formats.float8`).
FLOAT8: Mapping[str, np.dtype] = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
#: Bytes of packed numbers (see `formats.mxfp4`).
UINT8: Mapping[str, np.dtype] = {"U8": np.dtype(np.uint8)}
DTYPE_NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
#: The bits of the exponent, all of them set in NaN and infinity and in nothing else.
_EXPONENTS = {"float32": np.uint32(0x7F800000), "bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00)}


def all_finite(array: np.ndarray) -> bool:
    """Whether an array of any shape, of a dtype in `DTYPES`, holds neither NaN nor infinity."""
    mask = _EXPONENTS[array.dtype.name]
    bits = array.view(mask.dtype)  # far faster than isfinite, which ml_dtypes computes number by number
    if bits.flags.c_contiguous:
        bits = bits.reshape(-1)
    rows = max(1, BLOCK_BYTES * len(bits) // max(1, bits.nbytes))
    return not any(((bits[row : row + rows] & mask) == mask).any() for row in range(0, len(bits), rows))


@dataclass(frozen=True)
class TensorInfo:
    """What one tensor is and where it lies: file and, where the reader needs it, absolute byte range [start, end)."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Weights(Mapping[str, TensorInfo]):
    """All tensors of a checkpoint directory by name, read lazily; one subclass per file format."""

    directory: Path
    _tensors: dict[str, TensorInfo]

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @abc.abstractmethod
    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or `tensor[index]`, into an array of its own. Raises CheckpointError."""

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The numbers of a tensor in order, in flat blocks of some `BLOCK_BYTES`.

        A block may be overwritten once the next but one is asked for. Raises CheckpointError.
        """
        info = self[name]
        if not info.shape:
            yield self.read(name).reshape(-1)
            return
        rows = max(1, BLOCK_BYTES * info.shape[0] // max(1, info.nbytes))
        for row in range(0, info.shape[0], rows):
            yield self.read(name, (slice(row, row + rows),)).reshape(-1)


def refused_dtype(file: Path, name: str, dtype: str) -> CheckpointError:
    """The error for a tensor whose numbers we do not take, with what to do about it."""
    if dtype in ("F64", "float64"):
        return CheckpointError(f"{file}: tensor {name} has dtype {dtype}, which would be rounded; cast it to float32")
    return CheckpointError(
        f"{file}: tensor {name} has dtype {dtype}, as quantised or packed weights have; supported are"
        f" {', '.join(DTYPES)}: dequantise the checkpoint first or give the one it was made from"
    )


def read_header(
    file: Path, ignored: tuple[str, ...] = (), dtypes: Mapping[str, np.dtype] = DTYPES
) -> dict[str, TensorInfo]:
    """Parses and checks the header of one safetensors file; raises CheckpointError naming the file and the defect.

    Tensors have one of the `dtypes`. Those whose names end in one of `ignored` may have any; they are left out.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if prefix == LFS_POINTER:
            raise CheckpointError(f"{file} is a pointer of git-lfs, not the file itself; run git lfs pull")
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
    tensors = {name: _entry(file, name, entry, data_start, ignored, dtypes) for name, entry in header.items()}
    position = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != position:
            raise CheckpointError(f"{file}: tensor {info.name} starts at byte {info.start}, expected {position}")
        position = info.end
    if position != size:
        raise CheckpointError(
            f"{file} is truncated or has trailing bytes: {size} bytes, its header describes {position}"
        )
    return {name: info for name, info in tensors.items() if not name.endswith(ignored)}


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate keys")
    return result


def _entry(
    file: Path,
    name: str,
    entry: object,
    data_start: int,
    ignored: tuple[str, ...],
    dtypes: Mapping[str, np.dtype],
) -> TensorInfo:
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{file}: header entry of {name!r} is damaged") from None
    if not name.isprintable() or not isinstance(dtype_name, str):
        raise CheckpointError(f"{file}: header entry of {name!r} is damaged")
    numbers = (*shape, begin, end)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise CheckpointError(f"{file}: header entry of {name!r} is damaged")
    if name.endswith(ignored) and end >= begin:  # a dtype that we cannot name has a size that we cannot check
        return TensorInfo(name, file, np.dtype(np.uint8), (end - begin,), data_start + begin, data_start + end)
    if dtype_name not in dtypes:
        raise refused_dtype(file, name, dtype_name)
    dtype = dtypes[dtype_name]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{file}: tensor {name} of shape {list(shape)} {dtype_name} has {end - begin} bytes")
    return TensorInfo(name, file, dtype, shape, data_start + begin, data_start + end)


def read_shards(
    index_file: Path, header: Callable[[Path], dict[str, TensorInfo]], ignored: tuple[str, ...] = ()
) -> dict[str, TensorInfo]:
    """All tensors of the shards that an index file names, `header` reading those of one.

    Raises CheckpointError listing missing shards and every tensor that index and shards disagree about.
    """
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not all(isinstance(shard, str) for shard in shards):
            raise ValueError("weight_map holds something that is not a file name")
        if not all(name.isprintable() for name in weight_map):
            raise ValueError("weight_map holds a name that cannot be printed")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index_file} is damaged: {error}") from None
    problems, tensors = [], {}
    for shard in shards:
        if Path(shard).name != shard or shard in ("", "..") or not shard.isprintable():
            raise CheckpointError(f"{index_file} names a shard outside its folder: {shard!r}")
        file = index_file.parent / shard
        if not file.is_file():
            problems.append(f"shard {shard} is missing")
            continue
        stored = header(file)
        promised = {name for name, where in weight_map.items() if where == shard and not name.endswith(ignored)}
        problems += [f"{name} is not in {shard}" for name in sorted(promised - stored.keys())]
        problems += [f"{name} is in {shard} but not in the index" for name in sorted(stored.keys() - promised)]
        tensors |= stored
    if problems:
        raise CheckpointError(f"{index_file}: {summarise(problems)}")
    return tensors


def read_one(info: TensorInfo, index: tuple[slice, ...] = ()) -> np.ndarray:
    """Reads a tensor of a file, or `tensor[index]`; only the rows that the first slice names are read from disk."""
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
    with info.file.open("rb", buffering=0) as stream:
        stream.seek(start)
        _fill(stream, buffer, info)
    array = buffer.reshape(shape)
    return array[(slice(None), *index[1:])] if index[1:] else array


class TensorIndex(Weights):
    """All tensors of a checkpoint directory in safetensors (single file or sharded with an index), read lazily.

    Tensors have one of the `dtypes`; those whose names end in one of `ignored` are left out.
    """

    def __init__(self, directory: Path, ignored: tuple[str, ...] = (), dtypes: Mapping[str, np.dtype] = DTYPES) -> None:
        self.directory = Path(directory)
        index_file = self.directory / INDEX_NAME
        single = self.directory / SINGLE_NAME
        if single.is_file():  # before an index, as in transformers
            self._tensors = read_header(single, ignored, dtypes)
        elif index_file.is_file():
            self._tensors = read_shards(index_file, lambda file: read_header(file, ignored, dtypes), ignored)
        else:
            raise InputError(f"{self.directory} has neither {SINGLE_NAME} nor {INDEX_NAME}")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or `tensor[index]`; only the rows that the first slice names are read from disk."""
        return read_one(self._tensors[name], index)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The numbers of a tensor in order, through two buffers: fresh memory would cost more than the reading."""
        info = self._tensors[name]
        count = math.prod(info.shape)
        size = min(count, BLOCK_BYTES // info.dtype.itemsize) or 1
        buffers = itertools.cycle((np.empty(size, info.dtype), np.empty(size, info.dtype)))
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(info.start)
            for start in range(0, count, size):
                block = next(buffers)[: count - start]
                _fill(stream, block, info)
                yield block


def _fill(stream: RawIOBase, buffer: np.ndarray, info: TensorInfo) -> None:
    """Reads as many bytes as the buffer holds."""
    view, done = memoryview(buffer.view(np.uint8)), 0
    while done < len(view):
        got = stream.readinto(view[done:])
        if not got:
            raise CheckpointError(f"{info.file} ended while reading {info.name}")
        done += got
