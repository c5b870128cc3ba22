"""Orbax checkpoint directory of ours: `params/` by orbax, `hf/` with config and tokenizer, `tmjax.json` as marker."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tmjax.checkpoints.description import describe
from tmjax.checkpoints.formats.orbax_arrays import open_arrays, save_arrays
from tmjax.checkpoints.formats.safetensors import DTYPES_BY_NAME, all_finite
from tmjax.checkpoints.hub import CONFIG_NAME, copy_companions, write_config
from tmjax.checkpoints.lazy import LazyArray, in_memory
from tmjax.checkpoints.model import Model, Placement, default_placement
from tmjax.errors import CheckpointError, InputError, NonFiniteError
from tmjax.files.atomic import atomic_directory
from tmjax.files.jsonfile import read_json

MARKER = "tmjax.json"
FORMAT = 1


def is_orbax(directory: Path) -> bool:
    """Whether a directory was written by `save`; a Hugging Face checkpoint has a file of that name for its origin."""
    return (Path(directory) / MARKER).is_file() and not (Path(directory) / CONFIG_NAME).is_file()


def save(model: Model, path: Path, *, overwrite: bool = False) -> Path:
    """Writes parameters, config and tokenizer atomically, some rows of a layer at a time. Returns the path.

    `params/` is a checkpoint like any other to orbax; no chunk of it spans layers.
    """
    with atomic_directory(Path(path), overwrite=overwrite) as partial:
        marker = {
            "format": FORMAT,
            "written_ties": list(model.written_ties),
            "params": {
                name: {"shape": list(value.shape), "dtype": str(value.dtype)} for name, value in model.params.items()
            },
        }
        (partial / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        (partial / "hf").mkdir()
        write_config(model.config, partial / "hf")
        copy_companions(model.directory, partial / "hf")
        save_arrays(partial / "params", model.params, {row.path for row in model.rows if row.stacked})
    return Path(path)


def open_model(directory: Path) -> Model:
    """A directory written by `save` as a model whose parameters are `LazyArray`; raises as `load_model` does."""
    directory = Path(directory)
    marker = read_json(directory / MARKER)
    if marker.get("format") != FORMAT:
        raise InputError(
            f"{directory}: format {marker.get('format')!r} is not known to this version (it writes {FORMAT})"
        )
    described = describe(directory / "hf")
    config, family, spec = described.config, described.family, described.spec
    rows = {row.path: row for row in family.params(spec) if row.tied_to is None}
    arrays = _described(directory, marker, {path: row.stacked_shape(spec) for path, row in rows.items()})
    readers = open_arrays(directory / "params", arrays, {path: row.hf for path, row in rows.items() if row.stacked})
    params = {path: LazyArray(path, *arrays[path], _checked(directory, path, readers[path])) for path in rows}
    return Model(family, spec, params, config, directory / "hf", tuple(marker.get("written_ties", ())), described.notes)


def load(directory: Path, *, placement: Placement = default_placement) -> Model:
    """Reads a directory written by `save`; see `load_model`."""
    return in_memory(open_model(directory), placement)


def _described(
    directory: Path, marker: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every parameter from the marker; raises CheckpointError where the config disagrees."""
    entries = marker.get("params", {})
    for path, shape in shapes.items():
        entry = entries.get(path, {})
        if list(shape) != entry.get("shape") or entry.get("dtype") not in DTYPES_BY_NAME:
            raise CheckpointError(
                f"{directory}: parameter {path} is {entries.get(path)}, its config says {list(shape)}"
            )
    return {path: (shape, DTYPES_BY_NAME[entries[path]["dtype"]]) for path, shape in shapes.items()}


def _checked(
    directory: Path, path: str, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    def checked(slices: tuple[slice, ...]) -> np.ndarray:
        array = read(slices)
        if not all_finite(array):
            raise NonFiniteError(f"{directory}: parameter {path} holds NaN or infinity")
        return array

    return checked
