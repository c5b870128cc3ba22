"""What a checkpoint directory says of itself before any tensor is looked at: config, family, spec, notes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmjax.checkpoints.formats.container import container_notes, refuse_packed
from tmjax.checkpoints.hub import read_config
from tmjax.errors import InputError
from tmjax.models.families import family_of
from tmjax.models.families.base import Family
from tmjax.models.spec import DecoderSpec, ParamSpec


@dataclass(frozen=True)
class CheckpointDescription:
    """One checkpoint as its `config.json` describes it.

    `notes` are what a user should know and nothing refuses: settings without effect, files that are not read.
    """

    directory: Path
    config: Mapping[str, Any]
    family: Family
    spec: DecoderSpec
    notes: tuple[str, ...]

    @property
    def rows(self) -> tuple[ParamSpec, ...]:
        """The family's tensor table for this spec."""
        return self.family.params(self.spec)


def describe(directory: Path) -> CheckpointDescription:
    """Reads the config of a Hugging Face directory.

    Raises:
        InputError: There is no config, its family is not supported, its weights are quantised, or a setting is missing
            or not supported; names the directory.
    """
    directory = Path(directory)
    config = read_config(directory)
    try:
        family = family_of(config)
        spec, notes = family.read_config(config)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None
    refuse_packed(directory)
    return CheckpointDescription(directory, config, family, spec, (*notes, *container_notes(directory)))
