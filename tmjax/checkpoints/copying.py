"""Conversion of checkpoints larger than memory: block by block or layer by layer, checked as loading checks them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tmjax.checkpoints import hf, orbax
from tmjax.checkpoints.formats.safetensors import DTYPES_BY_NAME, Weights
from tmjax.checkpoints.formats.writer import DEFAULT_SHARD_SIZE, TensorMeta, parse_size, write_tensors
from tmjax.checkpoints.hf import finite_blocks, open_checkpoint, write_config
from tmjax.checkpoints.hub import copy_companions, resolve
from tmjax.checkpoints.lazy import cast
from tmjax.errors import InputError
from tmjax.files.atomic import atomic_directory
from tmjax.files.lock import OutputLock
from tmjax.files.owned import refuse_existing
from tmjax.files.paths import refuse_overlap
from tmjax.models.families.base import Family
from tmjax.models.spec import DecoderSpec


@dataclass(frozen=True)
class Converted:
    """What a conversion went through: family, architecture, number of parameters, notes on the checkpoint."""

    family: Family
    spec: DecoderSpec
    parameters: int
    notes: tuple[str, ...] = ()


def parse_dtype(name: str | None) -> np.dtype | None:
    """The dtype of a name; None stays None (keep what is stored). Raises InputError."""
    if name is not None and name not in DTYPES_BY_NAME:
        raise InputError(f"--dtype {name!r} is not known; write {', '.join(DTYPES_BY_NAME)}")
    return None if name is None else DTYPES_BY_NAME[name]


def cast_config(config: Mapping[str, Any], dtype: np.dtype | None) -> dict[str, Any]:
    """The config of a checkpoint whose tensors were cast to `dtype`, under the keys that it has for that."""
    if dtype is None:
        return dict(config)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]  # all versions read this one
    return dict(config) | dict.fromkeys(keys, dtype.name)


def stream(
    directory: Path,
    path: Path,
    *,
    dtype: np.dtype | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Converted:
    """Writes the checkpoint of a Hugging Face directory as safetensors, atomically, a small block at a time.

    The same files as loading and exporting it would write. Raises what `load_model` raises (CheckpointError for names,
    shapes, dtypes and tied copies that differ, NonFiniteError), and NonFiniteError for values too large for `dtype`.
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


def convert(
    model: str,
    out: Path,
    *,
    to: Literal["hf", "orbax"],
    dtype: np.dtype | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Converted:
    """Converts a checkpoint (directory, hub id, orbax directory of ours) to either form; `dtype` None keeps dtypes.

    Hugging Face to Hugging Face holds a block of a tensor at a time, the others a layer of a parameter. Raises what
    `load_model` raises, NonFiniteError for values too large for `dtype`, and InputError if `out` holds anything.
    """
    refuse_overlap(out, [("the checkpoint", model)])
    refuse_existing(out, overwrite=overwrite)
    directory = resolve(model)
    with OutputLock(out):
        return _convert(directory, out, to, dtype, max_shard_size, overwrite)


def _convert(
    directory: Path, out: Path, to: str, dtype: np.dtype | None, max_shard_size: str, overwrite: bool
) -> Converted:
    if to == "hf" and not orbax.is_orbax(directory):
        return stream(directory, out, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    parse_size(max_shard_size)
    opened = (orbax if orbax.is_orbax(directory) else hf).open_model(directory)
    if dtype is not None:
        params = {path: value.cast(dtype, opened.directory) for path, value in opened.params.items()}
        opened = replace(opened, params=params, config=cast_config(opened.config, dtype))
    if to == "hf":
        hf.export(opened, out, max_shard_size=max_shard_size, overwrite=overwrite)
    else:
        orbax.save(opened, out, overwrite=overwrite)
    return Converted(opened.family, opened.spec, opened.size, opened.notes)


def _blocks(index: Weights, name: str, dtype: np.dtype | None) -> Iterator[np.ndarray]:
    """The numbers of a tensor in `dtype`, block by block."""
    if dtype is None or dtype == index[name].dtype:
        return finite_blocks(index, name)
    what = f"{index[name].file}: tensor {name}"
    return (cast(block, dtype, what) for block in finite_blocks(index, name))
