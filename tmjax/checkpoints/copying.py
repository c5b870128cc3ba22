"""Out-of-core copies of Hugging Face checkpoints: tensor by tensor in small blocks, checked as loading checks them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tmjax.checkpoints.formats.safetensors import Weights
from tmjax.checkpoints.formats.writer import DEFAULT_SHARD_SIZE, TensorMeta, parse_size, write_tensors
from tmjax.checkpoints.hf import finite_blocks, open_checkpoint
from tmjax.checkpoints.hub import copy_companions, write_config
from tmjax.checkpoints.lazy import cast
from tmjax.files.atomic import atomic_directory
from tmjax.models.families.base import Family
from tmjax.models.spec import DecoderSpec


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint: family, architecture, number of parameters, notes."""

    family: Family
    spec: DecoderSpec
    parameters: int
    notes: tuple[str, ...] = ()


def cast_config(config: Mapping[str, Any], dtype: np.dtype | None) -> dict[str, Any]:
    """The config of a checkpoint whose tensors were cast to `dtype`, under the keys that it has for that."""
    if dtype is None:
        return dict(config)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]  # all versions read this one
    return dict(config) | dict.fromkeys(keys, dtype.name)


def copy_out_of_core(
    directory: Path,
    path: Path,
    *,
    dtype: np.dtype | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Converted:
    """Copies a Hugging Face checkpoint to safetensors files, atomically, a small block of a tensor at a time.

    The files are those that loading and exporting the checkpoint would write.

    Args:
        directory: Hugging Face directory.
        path: Output directory.
        dtype: Dtype of all tensors; None keeps the stored ones.
        max_shard_size: Largest safetensors file, for example "5GB".
        overwrite: Whether an existing output may be replaced.

    Returns:
        Family, architecture, number of parameters and notes.

    Raises:
        InputError: As `load_model` raises it.
        CheckpointError: Names, shapes, dtypes or tied copies differ from the config.
        NonFiniteError: A value is NaN, infinite or too large for `dtype`.
    """
    parse_size(max_shard_size)
    opened = open_checkpoint(directory)
    config, family, spec, index, ties = opened.config, opened.family, opened.spec, opened.index, opened.ties
    rows = family.params(spec)
    names = dict.fromkeys(name for row in rows for name in row.names(spec) if row.tied_to is None or name in ties)
    metas = [TensorMeta(name, dtype or index[name].dtype, index[name].shape) for name in names]
    with atomic_directory(Path(path), overwrite=overwrite) as partial:
        write_config(cast_config(config, dtype), partial)
        copy_companions(directory, partial)
        write_tensors(partial, metas, lambda name: _blocks(index, name, dtype), max_shard_size=max_shard_size)
    size = sum(math.prod(row.stacked_shape(spec)) for row in rows if row.tied_to is None)
    return Converted(family, spec, size, opened.notes)


def _blocks(index: Weights, name: str, dtype: np.dtype | None) -> Iterator[np.ndarray]:
    """The numbers of a tensor in `dtype`, block by block."""
    if dtype is None or dtype == index[name].dtype:
        return finite_blocks(index, name)
    tensor = f"{index[name].file}: tensor {name}"
    return (cast(block, dtype, tensor) for block in finite_blocks(index, name))
