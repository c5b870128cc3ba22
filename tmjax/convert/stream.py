"""Hugging Face -> Hugging Face tensor by tensor: a checkpoint larger than memory, checked as loading checks it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from tmjax.convert import hf, orbax
from tmjax.convert.hf import blocks, open_checkpoint, read_finite, write_config
from tmjax.convert.model import Model, load_model
from tmjax.errors import InputError, NonFiniteError
from tmjax.hub.atomic import atomic_directory, refuse_existing
from tmjax.hub.checkpoint import copy_companions, resolve
from tmjax.hub.tensors import DTYPES_BY_NAME, Weights
from tmjax.hub.writer import DEFAULT_SHARD_SIZE, TensorMeta, parse_size, write_tensors
from tmjax.models.families.base import Family
from tmjax.models.spec import DecoderSpec


@dataclass(frozen=True)
class Converted:
    """What a conversion went through: family, architecture, number of parameters."""

    family: Family
    spec: DecoderSpec
    parameters: int


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


def cast_model(model: Model, dtype: np.dtype) -> Model:
    """The model with every parameter cast to `dtype`; raises NonFiniteError if a value is too large for it."""
    params = {path: value.astype(dtype) for path, value in model.params.items()}
    for path, value in params.items():
        if not bool(jnp.isfinite(value).all()):
            raise NonFiniteError(f"{model.directory}: parameter {path} does not fit {dtype.name}")
    return replace(model, params=params, config=cast_config(model.config, dtype))


def stream(
    directory: Path,
    path: Path,
    *,
    dtype: np.dtype | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Converted:
    """Writes the checkpoint of a Hugging Face directory as safetensors, atomically, holding one tensor at a time.

    The same files as loading and exporting it would write. Raises what `load_model` raises (CheckpointError for names,
    shapes, dtypes and tied copies that differ, NonFiniteError), and NonFiniteError for values too large for `dtype`.
    """
    parse_size(max_shard_size)
    config, family, spec, index, ties = open_checkpoint(directory)
    rows = family.params(spec)
    names = dict.fromkeys(name for row in rows for name in row.names(spec) if row.tied_to is None or name in ties)
    metas = [TensorMeta(name, dtype or index[name].dtype, index[name].shape) for name in names]
    with atomic_directory(Path(path), overwrite=overwrite) as partial:
        write_config(cast_config(config, dtype), partial)
        copy_companions(directory, partial)
        write_tensors(partial, metas, lambda name: _read(index, name, dtype), max_shard_size=max_shard_size)
    size = sum(math.prod(row.stacked_shape(spec)) for row in rows if row.tied_to is None)
    return Converted(family, spec, size)


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

    Hugging Face to Hugging Face holds one tensor at a time, the others the whole model. Raises what `load_model`
    raises, and InputError if `out` holds anything.
    """
    refuse_existing(out, overwrite=overwrite)
    directory = resolve(model)
    if to == "hf" and not orbax.is_orbax(directory):
        return stream(directory, out, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    parse_size(max_shard_size)
    loaded = load_model(model)
    if dtype is not None:
        loaded = cast_model(loaded, dtype)
    if to == "hf":
        hf.export(loaded, out, max_shard_size=max_shard_size, overwrite=overwrite)
    else:
        orbax.save(loaded, out, overwrite=overwrite)
    return Converted(loaded.family, loaded.spec, loaded.size)


def _read(index: Weights, name: str, dtype: np.dtype | None) -> np.ndarray:
    """A tensor in `dtype`; only a block of it is ever held in both."""
    info = index[name]
    if dtype is None or dtype == info.dtype:
        return read_finite(index, name)
    result = np.empty(info.shape, dtype)
    for block in blocks(index, name):
        with np.errstate(over="ignore"):
            part = read_finite(index, name, block).astype(dtype)
        if not np.isfinite(part).all():
            raise NonFiniteError(f"{info.file}: tensor {name} does not fit {dtype.name}")
        result[block or ...] = part
    return result
