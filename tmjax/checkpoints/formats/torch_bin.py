"""PyTorch checkpoints on disk (`pytorch_model.bin`, sharded or not), read through a memory map, never unpickled freely.

PyTorch is imported only here and only when such a checkpoint is opened. `weights_only` restricts the pickle to tensors
and containers; at most one shard is mapped at a time.
Format: https://pytorch.org/docs/stable/notes/serialization.html (a zip archive of uncompressed storages and a pickle).
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tmjax.checkpoints.formats.safetensors import (
    DTYPES_BY_NAME,
    LFS_POINTER,
    TensorInfo,
    Weights,
    read_shards,
    refused_dtype,
)
from tmjax.errors import CheckpointError, InputError

BIN_INDEX_NAME = "pytorch_model.bin.index.json"
BIN_SINGLE_NAME = "pytorch_model.bin"
_DTYPES = {f"torch.{name}": dtype for name, dtype in DTYPES_BY_NAME.items()}


class TorchIndex(Weights):
    """All tensors of a checkpoint directory in PyTorch's format; the same interface as `TensorIndex`.

    Tensors whose names end in one of `ignored` are left out. Raises InputError without PyTorch, CheckpointError for
    files that are damaged, hold anything else than tensors, or hold dtypes other than float32, float16 and bfloat16.
    """

    def __init__(self, directory: Path, ignored: tuple[str, ...] = ()) -> None:
        self.directory = Path(directory)
        try:
            import torch  # noqa: F401
        except ImportError:
            raise InputError(
                f"{self.directory} holds its weights as {BIN_SINGLE_NAME}, which needs PyTorch:"
                " pip install 'tmjax[torch]', or give a checkpoint with safetensors"
            ) from None
        self._mapped: tuple[Path, dict[str, Any]] | None = None
        single, index_file = self.directory / BIN_SINGLE_NAME, self.directory / BIN_INDEX_NAME

        def header(file: Path) -> dict[str, TensorInfo]:
            stored = self._map(file)
            return {name: _info(file, name, stored[name]) for name in stored if not name.endswith(ignored)}

        if single.is_file():
            self._tensors = header(single)
        elif index_file.is_file():
            self._tensors = read_shards(index_file, header, ignored)
        else:
            raise InputError(f"{self.directory} has neither {BIN_SINGLE_NAME} nor {BIN_INDEX_NAME}")
        self._mapped = None

    def _map(self, file: Path) -> dict[str, Any]:
        if self._mapped is None or self._mapped[0] != file:
            self._mapped = None  # before the next one: pages of a mapped file count as memory
            self._mapped = file, _load(file)
        return self._mapped[1]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or `tensor[index]`, into an array of its own."""
        info = self._tensors[name]
        if any(part.step not in (None, 1) for part in index):
            raise ValueError(f"slices with a step are not read: {index}")
        stored = self._map(info.file)
        if name not in stored or _info(info.file, name, stored[name]) != info:
            raise CheckpointError(f"{info.file} changed while it was read")
        bits = stored[name].detach().view(_bits(info.dtype)).numpy()
        # A slice that ends before it begins is empty in NumPy, an error in PyTorch: hence sliced here.
        return np.array(bits[index] if bits.ndim else bits, order="C").view(info.dtype)


def _bits(dtype: np.dtype) -> Any:
    import torch

    return torch.int16 if dtype.itemsize == 2 else torch.int32


def _load(file: Path) -> dict[str, Any]:
    """Maps a file and returns its tensors by name."""
    import torch

    try:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CheckpointError(f"{file} is compressed; save it again with torch.save or as safetensors")
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(
                    f"{file} is a pointer of git-lfs, not the file itself; run git lfs pull"
                ) from None
        raise CheckpointError(
            f"{file} is truncated, damaged or of PyTorch before 1.6; save it again with torch.save or as safetensors"
        ) from None
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # its C++ and its unpickler raise all kinds
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{file} is damaged or holds more than tensors: {type(error).__name__}: {reason}"
        ) from None
    if isinstance(content, dict) and set(content) == {"state_dict"}:
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and name.isprintable() and isinstance(value, torch.Tensor)
        for name, value in content.items()
    ):
        raise CheckpointError(f"{file} does not hold a mapping from names to tensors")
    return content


def _info(file: Path, name: str, tensor: Any) -> TensorInfo:
    dtype = str(tensor.dtype)
    if dtype not in _DTYPES:
        raise refused_dtype(file, name, dtype.removeprefix("torch."))
    if str(tensor.layout) != "torch.strided" or tensor.device.type != "cpu":
        raise CheckpointError(f"{file}: tensor {name} is sparse or without data ({tensor.layout}, {tensor.device})")
    return TensorInfo(name, file, _DTYPES[dtype], tuple(tensor.shape))
