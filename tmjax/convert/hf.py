"""Hugging Face checkpoint <-> Flax parameters, both ways derived from the family's ParamSpec table."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from tmjax.convert.model import Model, Placement, default_placement
from tmjax.errors import CheckpointError, NonFiniteError, summarise
from tmjax.hub.atomic import atomic_directory
from tmjax.hub.checkpoint import CONFIG_NAME, copy_companions, read_config
from tmjax.hub.tensors import TensorIndex
from tmjax.hub.writer import DEFAULT_SHARD_SIZE, TensorMeta, write_tensors
from tmjax.models.families import family_of
from tmjax.models.spec import DecoderSpec, ParamSpec
from tmjax.typing import Array

#: Buffers that old checkpoints hold beside their parameters; recomputed from the config.
_BUFFERS = (".rotary_emb.inv_freq",)


def load(directory: Path, *, placement: Placement = default_placement) -> Model:
    """Reads a Hugging Face directory; see `load_model`."""
    config = read_config(directory)
    family = family_of(config)
    spec = family.spec(config)
    rows = family.params(spec)
    index = TensorIndex(directory)
    written_ties = _check(index, rows, spec)
    params = {row.path: _load_row(index, row, spec, placement) for row in rows if row.tied_to is None}
    for name, row in written_ties.items():
        if not np.array_equal(_bits(index.read(name)), _bits(np.asarray(params[row.tied_to]))):
            raise CheckpointError(
                f"{directory}: config says that {name} is tied, but it differs from what it is tied to"
            )
    return Model(family, spec, params, config, directory, tuple(written_ties))


def _check(index: TensorIndex, rows: tuple[ParamSpec, ...], spec: DecoderSpec) -> dict[str, ParamSpec]:
    """Compares names, shapes and dtypes with the table; returns the tied copies that are on disk."""
    wanted = {name: row for row in rows for name in row.names(spec)}
    missing = [name for name, row in wanted.items() if name not in index and row.tied_to is None]
    extra = [name for name in index if name not in wanted and not name.endswith(_BUFFERS)]
    held = {name: row for name, row in wanted.items() if name in index}
    shapes = [
        f"{name} has shape {list(index[name].shape)}, expected {list(row.shape(spec))}"
        for name, row in held.items()
        if index[name].shape != row.shape(spec)
    ]
    first = {row.path: index[row.names(spec)[0]].dtype for row in rows if row.names(spec)[0] in index}
    dtypes = [
        f"{name} is {index[name].dtype}, other layers are {first[row.path]}"
        for name, row in held.items()
        if row.path in first and index[name].dtype != first[row.path]
    ]
    kinds = [f"missing tensor {n}" for n in missing], [f"unexpected tensor {n}" for n in extra], shapes, dtypes
    if any(kinds):
        problems = "; ".join(summarise(kind) for kind in kinds if kind)
        raise CheckpointError(f"{index.directory} does not match its config.json: {problems}")
    return {name: row for name, row in held.items() if row.tied_to is not None}


def _load_row(index: TensorIndex, row: ParamSpec, spec: DecoderSpec, placement: Placement) -> Array:
    names, shape = row.names(spec), row.stacked_shape(spec)

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        if not row.stacked:
            return _finite(index, names[0], slices)
        chosen = names[slices[0]]
        parts = [_finite(index, name, tuple(slices[1:])) for name in chosen]
        return np.stack(parts) if len(parts) > 1 else parts[0][None]

    sharding = placement(row, shape)
    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)


def _finite(index: TensorIndex, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    array = index.read(name, slices)
    # The sum is finite only if every entry is, unless it overflows, which a second, exact look decides.
    with np.errstate(all="ignore"):
        suspicious = not np.isfinite(array.sum(dtype=np.float32))
    if suspicious and not np.isfinite(array).all():
        raise NonFiniteError(f"{index[name].file}: tensor {name} holds NaN or infinity")
    return array


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def tensors(model: Model) -> tuple[list[TensorMeta], Callable[[str], np.ndarray]]:
    """All tensors of the model under their Hugging Face names, in table order, and a function that reads one."""
    metas, where = [], {}
    for row in model.rows:
        path = row.tied_to or row.path
        for layer, name in enumerate(row.names(model.spec)):
            if row.tied_to is not None and name not in model.written_ties:
                continue
            metas.append(TensorMeta(name, np.dtype(model.params[path].dtype), row.shape(model.spec)))
            where[name] = (path, layer if row.stacked else None)

    def read(name: str) -> np.ndarray:
        path, layer = where[name]
        return np.asarray(model.params[path] if layer is None else model.params[path][layer])

    return metas, read


def write(model: Model, directory: Path, *, max_shard_size: str = DEFAULT_SHARD_SIZE) -> None:
    """Writes a Hugging Face checkpoint into an existing, empty directory: weights, config, tokenizer and companions."""
    (directory / CONFIG_NAME).write_text(
        json.dumps(dict(model.config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    copy_companions(model.directory, directory)
    metas, read = tensors(model)
    write_tensors(directory, metas, read, max_shard_size=max_shard_size)


def export(model: Model, path: Path, *, max_shard_size: str = DEFAULT_SHARD_SIZE, overwrite: bool = False) -> Path:
    """Writes a Hugging Face checkpoint directory atomically; bit-exact inverse of `load`. Returns its path."""
    with atomic_directory(Path(path), overwrite=overwrite) as partial:
        write(model, partial, max_shard_size=max_shard_size)
    return Path(path)
