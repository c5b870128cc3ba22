"""Loading a checkpoint of any kind: a Hugging Face directory, a hub id or an orbax directory of ours."""

from pathlib import Path

from tmjax.checkpoints import hf, orbax
from tmjax.checkpoints.description import describe
from tmjax.checkpoints.formats.weights import weight_files
from tmjax.checkpoints.headers import open_headers
from tmjax.checkpoints.hub import resolve
from tmjax.checkpoints.model import Model, Placement, default_placement
from tmjax.errors import InputError


def config_directory(path: str | Path) -> Path:
    """Returns the directory of config and tokenizer of a checkpoint (directory, hub id or orbax directory of ours)."""

    directory = resolve(str(path))
    return directory / "hf" if orbax.is_orbax(directory) else directory


def load_model(path: str | Path, *, placement: Placement = default_placement) -> Model:
    """Loads a checkpoint into memory; dtypes are kept.

    Args:
        path: Hugging Face directory, hub id, or orbax directory written by `tmjax convert`.
        placement: Chooses where every parameter lives, from its ParamSpec and shape; the default device unless given.

    Returns:
        The model: parameters by path, architecture, config, and the data needed to write it again.

    Raises:
        InputError: There is no such checkpoint, or its family is not supported.
        CheckpointError: Tensors are missing, unexpected or mis-shaped; all are listed.
        NonFiniteError: A parameter is NaN or infinite.
    """
    directory = resolve(str(path))
    reader = orbax if orbax.is_orbax(directory) else hf
    return reader.load(directory, placement=placement)


def checkpoint_notes(path: str | Path) -> tuple[str, ...]:
    """Notes on a checkpoint (directory, hub id or orbax directory of ours): settings and files without effect.

    Raises InputError and CheckpointError as `load_model` does, except for faults that only the numbers show.
    """
    described = describe(config_directory(path))
    return open_headers(described).notes if weight_files(described.directory) else described.notes


def require_plain(path: str | Path) -> None:
    """Raises InputError for checkpoints that are read as sources alone: a merge cannot write them back as they are."""
    described = describe(config_directory(path))
    if described.wrapper is not None:
        raise InputError(
            f"the target {path} is a multimodal {described.wrapper.model_type}, of which only the text model is read; "
            f"write that by itself first: tmjax convert {path} OUT --to hf"
        )
    if described.packing is not None:
        raise InputError(
            f"the target {path} has {described.packing.name} weights; give the checkpoint that it was made from, or "
            f"write it dequantised first: tmjax convert {path} OUT --to hf"
        )
