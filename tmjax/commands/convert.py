"""`tmjax convert`: Hugging Face's form and orbax's, also of checkpoints larger than memory; differences as a LoRA."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from tmjax.checkpoints import hf, orbax
from tmjax.checkpoints.copying import Converted, cast_config, copy_out_of_core
from tmjax.checkpoints.formats.safetensors import DTYPES_BY_NAME
from tmjax.checkpoints.formats.writer import DEFAULT_SHARD_SIZE, parse_size
from tmjax.checkpoints.hub import resolve
from tmjax.checkpoints.lora_export import LoraExport, export_lora
from tmjax.errors import InputError
from tmjax.files.lock import OutputLock
from tmjax.files.owned import refuse_existing
from tmjax.files.paths import refuse_overlap


def parse_dtype(name: str | None) -> np.dtype | None:
    """Looks up the dtype of a name; None stays None (keep the stored dtypes). Raises InputError."""
    if name is not None and name not in DTYPES_BY_NAME:
        raise InputError(f"--dtype {name!r} is not known; write {', '.join(DTYPES_BY_NAME)}")
    return None if name is None else DTYPES_BY_NAME[name]


def convert(
    model: str | Path,
    out: str | Path,
    *,
    to: Literal["hf", "orbax"],
    dtype: np.dtype | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> Converted:
    """Converts a checkpoint to a Hugging Face or an orbax directory.

    Memory holds one block of a tensor at a time from Hugging Face to Hugging Face, otherwise one layer of a parameter.

    Args:
        model: Hugging Face directory, hub id or orbax directory of ours.
        out: Output directory.
        to: Form of the output.
        dtype: Dtype of all parameters; None keeps the stored ones.
        max_shard_size: Largest safetensors file, for example "5GB".
        overwrite: Whether an existing output of tmjax may be replaced.

    Returns:
        Family, architecture, number of parameters and notes.

    Raises:
        InputError: `out` holds anything or overlaps with `model`, or as `load_model` raises it.
        CheckpointError: As `load_model` raises it.
        NonFiniteError: A value is NaN, infinite or too large for `dtype`.
    """
    model, out = str(model), Path(out)
    dtype = None if dtype is None else np.dtype(dtype)
    refuse_overlap(out, [("the checkpoint", model)])
    refuse_existing(out, overwrite=overwrite)
    directory = resolve(model)
    with OutputLock(out):
        is_orbax = orbax.is_orbax(directory)
        if to == "hf" and not is_orbax:
            return copy_out_of_core(directory, out, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
        parse_size(max_shard_size)
        opened = (orbax if is_orbax else hf).open_model(directory)
        if dtype is not None:
            params = {path: value.cast(dtype, opened.directory) for path, value in opened.params.items()}
            opened = replace(opened, params=params, config=cast_config(opened.config, dtype))
        if to == "hf":
            hf.export(opened, out, max_shard_size=max_shard_size, overwrite=overwrite)
        else:
            orbax.save(opened, out, overwrite=overwrite)
        return Converted(opened.family, opened.spec, opened.size, opened.notes)


def extract_lora(
    model: str | Path, out: str | Path, *, base: str | Path, rank: int, overwrite: bool = False
) -> LoraExport:
    """Writes the difference of two checkpoints of one architecture as a PEFT adapter.

    Args:
        model: Hugging Face directory or hub id of the changed model.
        out: Output directory.
        base: Hugging Face directory or hub id of the model that the adapter belongs to; its name in the adapter too.
        rank: Rank of every projection's update.
        overwrite: Whether an existing output of tmjax may be replaced.

    Returns:
        Errors of the approximation, and changes that it leaves out.

    Raises:
        InputError: `out` holds anything or overlaps with an input, or as `export_lora` raises it.
        CheckpointError: The two differ in tensors or shapes.
    """
    names, out = {"the checkpoint": str(model), "the base model": str(base)}, Path(out)
    refuse_overlap(out, list(names.items()))
    refuse_existing(out, overwrite=overwrite)
    changed, unchanged = (resolve(name) for name in names.values())
    for name, directory in zip(names.values(), (changed, unchanged), strict=True):
        if orbax.is_orbax(directory):
            raise InputError(f"{name} is an orbax checkpoint; tmjax convert {name} OUT --to hf first")
    with OutputLock(out):
        return export_lora(unchanged, changed, out, rank=rank, base_name=str(base), overwrite=overwrite)
