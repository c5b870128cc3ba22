"""Streamed safetensors writer: tensors are produced one by one and never held together."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tmjax.checkpoints.formats.safetensors import DTYPE_NAMES, INDEX_NAME, SINGLE_NAME
from tmjax.errors import InputError

DEFAULT_SHARD_SIZE = "5GB"
#: Makes a tensor: an array, or its numbers in order in flat blocks, which stay as they are while the next one is made.
Producer = Callable[[str], np.ndarray | Iterable[np.ndarray]]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class TensorMeta:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `200MiB` or `1000000`; raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise InputError(f"{text!r} is not a size; write for example 5GB or 200MiB")
    return size


def plan_shards(tensors: Sequence[TensorMeta], max_shard_bytes: int) -> list[list[TensorMeta]]:
    """Splits tensors, in the order given, into shards of at most `max_shard_bytes` (one larger tensor gets its own)."""
    shards: list[list[TensorMeta]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return shards


def write_tensors(
    directory: Path,
    tensors: Sequence[TensorMeta],
    read: Producer,
    *,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
) -> None:
    """Writes `model.safetensors`, or numbered shards and their index, into an existing directory.

    `read(name)` is called once per tensor, in the order given; dtype and shape must be those announced.
    """
    shards = plan_shards(tensors, parse_size(max_shard_size))
    if len(shards) == 1:
        _write_file(directory / SINGLE_NAME, shards[0], read)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard, read)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: Sequence[TensorMeta], read: Producer) -> None:
    # Wider dtypes first keeps every tensor aligned to its item size, as the reference implementation does.
    ordered = sorted(tensors, key=lambda tensor: (-np.dtype(tensor.dtype).itemsize, tensor.name))
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little"))
        stream.write(raw)
        for tensor in tensors:  # as given, since what they are made from may be cheap to read in that order only
            stream.seek(8 + len(raw) + header[tensor.name]["data_offsets"][0])
            _write_tensor(stream, tensor, read(tensor.name))


def _write_tensor(stream: BinaryIO, tensor: TensorMeta, made: np.ndarray | Iterable[np.ndarray]) -> None:
    whole = isinstance(made, np.ndarray)
    written = 0
    for block in [made] if whole else _ahead(made):
        if block.dtype != tensor.dtype or (whole and block.shape != tuple(tensor.shape)):
            raise ValueError(f"{tensor.name}: announced {tensor.dtype} {tensor.shape}, got {block.dtype} {block.shape}")
        stream.write(np.asarray(block, order="C").reshape(-1).view(np.uint8))
        written += block.nbytes
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name}: announced {tensor.nbytes} bytes, got {written}")


def _ahead(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same blocks, the next one made in a thread while one is used."""
    left = iter(blocks)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, left, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, left, None)
            yield block
