"""Orbax checkpoint directory of ours: `params/` by orbax, `hf/` with config and tokenizer, `tmjax.json` as marker."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tmjax.convert.model import Model, Placement, default_placement
from tmjax.errors import CheckpointError, InputError, NonFiniteError
from tmjax.hub.atomic import atomic_directory
from tmjax.hub.checkpoint import CONFIG_NAME, copy_companions, read_config, read_json
from tmjax.models.families import family_of

MARKER = "tmjax.json"
FORMAT = 1


def is_orbax(directory: Path) -> bool:
    """Whether a directory was written by `save`."""
    return (Path(directory) / MARKER).is_file()


def save(model: Model, path: Path, *, overwrite: bool = False) -> Path:
    """Writes parameters, config and tokenizer atomically. Returns the path."""
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
        (partial / "hf" / CONFIG_NAME).write_text(
            json.dumps(dict(model.config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        copy_companions(model.directory, partial / "hf")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((partial / "params").absolute(), dict(model.params))
            checkpointer.wait_until_finished()
    return Path(path)


def load(directory: Path, *, placement: Placement = default_placement) -> Model:
    """Reads a directory written by `save`; see `load_model`."""
    directory = Path(directory)
    marker = read_json(directory / MARKER)
    if marker.get("format") != FORMAT:
        raise InputError(
            f"{directory}: format {marker.get('format')!r} is not known to this version (it writes {FORMAT})"
        )
    config = read_config(directory / "hf")
    family = family_of(config)
    spec = family.spec(config)
    rows = [row for row in family.params(spec) if row.tied_to is None]
    held = marker.get("params", {})
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {}
    for row in rows:
        shape = row.stacked_shape(spec)
        if list(shape) != held.get(row.path, {}).get("shape"):
            raise CheckpointError(
                f"{directory}: parameter {row.path} is {held.get(row.path)}, its config says {list(shape)}"
            )
        wanted[row.path] = jax.ShapeDtypeStruct(
            shape, np.dtype(held[row.path]["dtype"]), sharding=placement(row, shape) or default
        )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore((directory / "params").absolute(), wanted)
    except (ValueError, OSError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{directory}/params is damaged: {reason}") from None
    for name, value in params.items():
        if not bool(jax.numpy.isfinite(value).all()):
            raise NonFiniteError(f"{directory}: parameter {name} holds NaN or infinity")
    return Model(family, spec, params, config, directory / "hf", tuple(marker.get("written_ties", ())))
