"""Files of a checkpoint directory and their readers: safetensors if there are any, otherwise PyTorch's."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from tmjax.checkpoints.formats.container import no_weights
from tmjax.checkpoints.formats.float8 import Float8
from tmjax.checkpoints.formats.mxfp4 import Mxfp4
from tmjax.checkpoints.formats.nvfp4 import Nvfp4
from tmjax.checkpoints.formats.safetensors import INDEX_NAME, SINGLE_NAME, TensorIndex, Weights
from tmjax.checkpoints.formats.torch_bin import BIN_INDEX_NAME, BIN_SINGLE_NAME, TorchIndex

#: Ways in which weights are quantised that are read.
Packing: TypeAlias = Float8 | Mxfp4 | Nvfp4


def has_safetensors(directory: Path) -> bool:
    """Whether a directory holds weights (or their index) in safetensors."""
    return any((Path(directory) / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


def has_torch(directory: Path) -> bool:
    """Whether a directory holds weights (or their index) in PyTorch's format."""
    return any((Path(directory) / name).is_file() for name in (BIN_SINGLE_NAME, BIN_INDEX_NAME))


def shard_names(index_file: Path) -> list[str]:
    """Names of the shards that an index file lists; none if it is damaged, which whoever reads it says."""
    try:
        shards = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({shard for shard in shards if isinstance(shard, str)})
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return []


def weight_files(directory: Path) -> list[Path]:
    """The files of weights that are read of a directory, the index included; other copies in it are left out."""
    directory = Path(directory)
    names = ((SINGLE_NAME, INDEX_NAME), (BIN_SINGLE_NAME, BIN_INDEX_NAME))
    for single, index in names:
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            shards = (directory / name for name in shard_names(directory / index) if Path(name).name == name)
            return [directory / index, *(shard for shard in shards if shard.is_file())]
    return []


def open_weights(directory: Path, ignored: tuple[str, ...] = (), packing: Packing | None = None) -> Weights:
    """The tensors of a checkpoint directory, read lazily; those whose names end in one of `ignored` are left out.

    With a `packing` weights are dequantised as they are read.

    Raises InputError if there are none or their format needs a package that is not there, CheckpointError if they are
    damaged or quantised.
    """
    directory = Path(directory)
    if packing is not None and has_safetensors(directory):
        return packing.opened(TensorIndex(directory, ignored, packing.dtypes))
    if has_safetensors(directory):
        return TensorIndex(directory, ignored)
    if has_torch(directory):
        return TorchIndex(directory, ignored)
    raise no_weights(directory)


class Renamed(Weights):
    """Tensors under other names than those that they are stored under.

    `stored` gives every new name the stored one; tensors that it leaves out are not seen.
    """

    def __init__(self, weights: Weights, stored: Mapping[str, str]) -> None:
        self.directory = weights.directory
        self._weights = weights
        self._stored = dict(stored)
        self._tensors = {name: weights[old] for name, old in stored.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or `tensor[index]`, into an array of its own. Raises CheckpointError."""
        return self._weights.read(self._stored[name], index)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The numbers of a tensor in order, in flat blocks (see `Weights.blocks`)."""
        return self._weights.blocks(self._stored[name])
