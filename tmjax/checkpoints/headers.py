"""The tensors of a Hugging Face directory, matched with its config by headers alone: no number is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmjax.checkpoints.description import CheckpointDescription
from tmjax.checkpoints.formats.adapter import Folded
from tmjax.checkpoints.formats.fused_experts import SingleExperts
from tmjax.checkpoints.formats.names import matched
from tmjax.checkpoints.formats.safetensors import Weights
from tmjax.checkpoints.formats.weights import Renamed, open_weights
from tmjax.errors import CheckpointError, summarise
from tmjax.models.families.base import BUFFERS, Family
from tmjax.models.spec import DecoderSpec, ParamSpec


@dataclass(frozen=True)
class CheckpointHeaders:
    """A Hugging Face directory whose tensors match its config; only headers were read.

    `directory` is where config, tokenizer and weights lie: of an adapter that of its base model.
    `ties` are the tied copies that are on disk, `notes` what a user should know and nothing refuses.
    """

    directory: Path
    config: Mapping[str, Any]
    family: Family
    spec: DecoderSpec
    index: Weights
    ties: Mapping[str, ParamSpec]
    notes: tuple[str, ...]


def open_headers(described: CheckpointDescription) -> CheckpointHeaders:
    """Matches the tensors of a directory with its config, reading headers alone.

    Raises InputError and CheckpointError as `load_model` does, except for faults that only the numbers show.
    """
    rows, spec = described.rows, described.spec
    index = open_weights(described.directory, BUFFERS, described.packing)
    if described.wrapper is not None:
        names = {name: described.wrapper.text_name(name) for name in index}
        index = Renamed(index, {text: name for name, text in names.items() if text is not None})
        index = SingleExperts(index) if described.wrapper.has_fused_experts else index
    index, renamed = matched(index, rows, spec)
    index, further = _without_further(index, described)
    ties = check_tensors(index, rows, spec)
    if described.adapter is not None:
        index = Folded(index, described.adapter)
    notes = (*described.notes, *renamed, *further)
    return CheckpointHeaders(described.directory, described.config, described.family, spec, index, ties, notes)


def _without_further(index: Weights, described: CheckpointDescription) -> tuple[Weights, tuple[str, ...]]:
    """The tensors without those that predict tokens beyond the next one, and a note on them if there are any."""
    begins = tuple(text.format(layers=described.spec.layers) for text in described.family.further)
    kept = {name: name for name in index if not name.startswith(begins)} if begins else index
    if len(kept) == len(index):
        return index, ()
    note = (
        f"{len(index) - len(kept)} tensors that predict tokens beyond the next one ({', '.join(begins)}*) are not read,"
        " and a checkpoint that is written lacks them"
    )
    return Renamed(index, kept), (note,)


def check_tensors(index: Weights, rows: tuple[ParamSpec, ...], spec: DecoderSpec) -> dict[str, ParamSpec]:
    """Compares names, shapes and dtypes with the table; returns the tied copies that are on disk.

    Raises CheckpointError listing every difference.
    """
    expected = {name: row for row in rows for name in row.names(spec)}  # of rows in one tensor any will do
    missing = [name for name, row in expected.items() if name not in index and row.tied_to is None]
    extra = [name for name in index if name not in expected]
    stored = {name: row for name, row in expected.items() if name in index}
    shapes = [
        f"{name} has shape {list(index[name].shape)}, expected {list(row.disk_shape(spec))}"
        for name, row in stored.items()
        if index[name].shape != row.disk_shape(spec)
    ]
    first = {row.path: index[row.names(spec)[0]].dtype for row in rows if row.names(spec)[0] in index}
    dtypes = [
        f"{name} is {index[name].dtype}, other layers are {first[row.path]}"
        for name, row in stored.items()
        if row.path in first and index[name].dtype != first[row.path]
    ]
    kinds = [f"missing tensor {n}" for n in missing], [f"unexpected tensor {n}" for n in extra], shapes, dtypes
    heads = [name for row in rows if row.path.startswith("head.") for name in row.names(spec)]
    if missing == heads and not any(kinds[1:]):
        raise CheckpointError(
            f"{index.directory} holds a base model: it lacks the output head {heads[0]}, which its config.json does not"
            " tie to the embeddings; give the checkpoint of the language model"
        )
    if any(kinds):
        problems = "; ".join(summarise(kind) for kind in kinds if kind)
        raise CheckpointError(f"{index.directory} does not match its config.json: {problems}")
    return {name: row for name, row in stored.items() if row.tied_to is not None}
