"""Hugging Face checkpoint <-> Flax parameters, both ways derived from the family's ParamSpec table."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tmjax.checkpoints.description import describe
from tmjax.checkpoints.formats.safetensors import Weights, all_finite
from tmjax.checkpoints.formats.writer import DEFAULT_SHARD_SIZE, TensorMeta, write_tensors
from tmjax.checkpoints.headers import CheckpointHeaders, open_headers
from tmjax.checkpoints.hub import copy_companions, write_config
from tmjax.checkpoints.lazy import LazyArray, in_memory
from tmjax.checkpoints.model import Model, Placement, default_placement
from tmjax.errors import CheckpointError, NonFiniteError
from tmjax.files.atomic import atomic_directory
from tmjax.models.spec import DecoderSpec, ParamSpec
from tmjax.sharding import hosts


def open_checkpoint(directory: Path) -> CheckpointHeaders:
    """Opens a Hugging Face directory; raises InputError and CheckpointError as `load_model` does."""
    opened = open_headers(describe(directory))
    rows, index = opened.family.params(opened.spec), opened.index
    originals = {row.path: row.names(opened.spec)[0] for row in rows if not row.stacked}
    for name, row in opened.ties.items():
        copies = (index.blocks(each) for each in (name, originals[row.tied_to]))
        if not all(np.array_equal(*(block.view(np.uint8) for block in pair)) for pair in zip(*copies, strict=True)):
            raise CheckpointError(
                f"{directory}: config says that {name} is tied, but it differs from what it is tied to"
            )
    return opened


def open_model(directory: Path) -> Model:
    """A Hugging Face directory as a model whose parameters are `LazyArray`; raises as `load_model` does."""
    opened = open_checkpoint(directory)
    rows = opened.family.params(opened.spec)
    params = {row.path: _lazy(opened.index, row, opened.spec) for row in rows if row.tied_to is None}
    ties = tuple(opened.ties)
    return Model(opened.family, opened.spec, params, opened.config, opened.directory, ties, notes=opened.notes)


def load(directory: Path, *, placement: Placement = default_placement) -> Model:
    """Reads a Hugging Face directory; see `load_model`."""
    return in_memory(open_model(directory), placement)


def _lazy(index: Weights, row: ParamSpec, spec: DecoderSpec) -> LazyArray:
    names, shape = row.layer_names(spec), row.stacked_shape(spec)

    def one(names: list[str], slices: tuple[slice, ...]) -> np.ndarray:
        """One layer's parameter, or slices of it."""
        if row.per_entry:  # of experts a device may hold some, and a part of each
            return np.stack([read_finite(index, name, tuple(slices[1:])) for name in names[slices[0]]])
        if row.part is None:
            return read_finite(index, names[0], slices)
        own, part = row.shape(spec), row.part
        if part.axis > 0 and (part.transposed or part.step > 1):  # of the leading axis some entries are enough
            first, rest = slices[0], slices[1:]
            entries = read_finite(index, names[0], (first,))
            return part.view(entries, (len(entries), *own[1:]))[(slice(None), *rest)]
        if part.of == 1 and part.step == 1 and not part.transposed and not part.row:
            first, stop, _ = slices[part.axis].indices(own[part.axis])
            moved = slice(part.start + first, part.start + stop)
            return read_finite(index, names[0], (*slices[: part.axis], moved, *slices[part.axis + 1 :]))
        return part.view(read_finite(index, names[0]), own).reshape(own)[slices]

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        if not row.stacked:
            return one(names[0], slices)
        parts = [one(layer, tuple(slices[1:])) for layer in names[slices[0]]]
        return np.stack(parts) if len(parts) > 1 else parts[0][None]

    return LazyArray(row.path, shape, index[names[0][0]].dtype, read)


def read_finite(index: Weights, name: str, slices: tuple[slice, ...] = ()) -> np.ndarray:
    """Reads a tensor or slices of it; raises NonFiniteError for NaN and infinity."""
    return _finite(index.read(name, slices), index, name)


def finite_blocks(index: Weights, name: str) -> Iterator[np.ndarray]:
    """The numbers of a tensor in small flat blocks (see `Weights.blocks`); raises as `read_finite` does."""
    return (_finite(block, index, name) for block in index.blocks(name))


def _finite(array: np.ndarray, index: Weights, name: str) -> np.ndarray:
    if not all_finite(array):
        raise NonFiniteError(f"{index[name].file}: tensor {name} holds NaN or infinity")
    return array


def tensors(model: Model) -> tuple[list[TensorMeta], Callable[[str], np.ndarray]]:
    """All tensors of the model under their Hugging Face names, in table order, and a function that makes one."""
    metas: dict[str, TensorMeta] = {}
    where: dict[str, list[tuple[ParamSpec, tuple[int, ...]]]] = {}
    for row in model.rows:
        dtype = np.dtype(model.params[row.tied_to or row.path].dtype)
        for layer, names in enumerate(row.layer_names(model.spec)):
            for entry, name in enumerate(names):
                if row.tied_to is not None and name not in model.written_ties:
                    continue
                at = ((layer,) if row.stacked else ()) + ((entry,) if row.per_entry else ())
                metas.setdefault(name, TensorMeta(name, dtype, row.disk_shape(model.spec)))
                where.setdefault(name, []).append((row, at))

    def read(name: str) -> np.ndarray:
        parts = [(row, hosts.to_host(model.params[row.tied_to or row.path][at])) for row, at in where[name]]
        if parts[0][0].part is None:
            return parts[0][1]
        tensor = np.empty(metas[name].shape, metas[name].dtype)
        for row, value in parts:
            view = row.part.view(tensor, value.shape)
            view[...] = value.reshape(view.shape)
        return tensor

    return list(metas.values()), read


def write(model: Model, directory: Path, *, max_shard_size: str = DEFAULT_SHARD_SIZE) -> None:
    """Writes a Hugging Face checkpoint into an existing, empty directory: weights, config, tokenizer and companions.

    Of several processes all must call it: tensor by tensor is gathered from them, and the first one writes.
    """
    if hosts.is_first():
        copy_companions(model.directory, directory)
    write_weights(model, directory, max_shard_size=max_shard_size)


def write_weights(model: Model, directory: Path, *, max_shard_size: str = DEFAULT_SHARD_SIZE) -> None:
    """Writes weights and config alone into an existing directory; see `write`."""
    metas, read = tensors(model)
    if not hosts.is_first():
        for meta in metas:  # in the order in which `write_tensors` asks for them
            read(meta.name)
        return
    write_config(model.config, directory)
    write_tensors(directory, metas, read, max_shard_size=max_shard_size)


def export(
    model: Model, path: str | Path, *, max_shard_size: str = DEFAULT_SHARD_SIZE, overwrite: bool = False
) -> Path:
    """Writes a model as a Hugging Face checkpoint: weights, config, tokenizer and companion files.

    The export of a loaded checkpoint has its tensors bit for bit. The directory appears once it is complete.

    Args:
        model: The model.
        path: Output directory.
        max_shard_size: Largest safetensors file, for example "5GB".
        overwrite: Whether an existing output of tmjax is replaced.

    Returns:
        The output directory.

    Raises:
        InputError: The output exists.
    """
    path = Path(path)
    with atomic_directory(path, overwrite=overwrite) if hosts.is_first() else contextlib.nullcontext(path) as partial:
        write(model, partial, max_shard_size=max_shard_size)
    hosts.barrier(f"export {path}")
    return path
