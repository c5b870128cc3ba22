"""Description of a checkpoint directory without its tensors: config, family, spec, notes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tmjax.checkpoints.formats.adapter import Adapter
from tmjax.checkpoints.formats.container import container_notes, packing_beside, refuse_packed
from tmjax.checkpoints.formats.float8 import Float8
from tmjax.checkpoints.formats.mxfp4 import Mxfp4
from tmjax.checkpoints.formats.nvfp4 import Nvfp4
from tmjax.checkpoints.formats.weights import Packing
from tmjax.checkpoints.hub import adapter_base, is_adapter, read_config
from tmjax.errors import InputError
from tmjax.models.families import ALIASES, family_of
from tmjax.models.families.base import Family
from tmjax.models.families.quantised import is_mxfp4, is_nvfp4, packed_settings, quantisation, without_quantisation
from tmjax.models.families.wrappers import Wrapper, wrapper_of
from tmjax.models.spec import DecoderSpec, ParamSpec


@dataclass(frozen=True)
class CheckpointDescription:
    """One checkpoint as its `config.json` describes it; of an `adapter` the base model's.

    `config` is that of the text model of a multimodal `wrapper`, and of the dequantised model where weights have
    a `packing`. `notes` are what a user should know and nothing refuses: settings without effect, files not read.
    """

    directory: Path
    config: Mapping[str, Any]
    family: Family
    spec: DecoderSpec
    notes: tuple[str, ...]
    wrapper: Wrapper | None = None
    packing: Packing | None = None
    adapter: Adapter | None = None

    @property
    def rows(self) -> tuple[ParamSpec, ...]:
        """The family's tensor table for this spec."""
        return self.family.params(self.spec)


def packing_of(directory: Path, config: Mapping[str, Any]) -> Packing | None:
    """Finds how the weights of a directory are quantised, if that is a way that is read; None for others and none."""
    settings = packed_settings(config) if quantisation(config) else packing_beside(directory)
    if settings is None:
        return None
    return Mxfp4() if is_mxfp4(settings) else Nvfp4() if is_nvfp4(settings) else Float8.of(config, settings)


def describe(directory: Path) -> CheckpointDescription:
    """Reads the config of a Hugging Face directory.

    Raises:
        InputError: There is no config, its family is not supported, its weights are quantised, or a setting is missing
            or not supported; names the directory.
    """
    directory = Path(directory)
    if is_adapter(directory):
        adapter = Adapter(directory)
        base = describe(adapter_base(directory, adapter))
        return replace(base, adapter=adapter, notes=(*base.notes, adapter.note))
    config = read_config(directory)
    wrapper = wrapper_of(config)
    if wrapper is not None:
        config = wrapper.config
    packing = packing_of(directory, config)
    if packing is not None:
        config = without_quantisation(config)
    try:
        family = family_of(config)
        spec, notes = family.read_config(config)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None
    refuse_packed(directory)
    if wrapper is not None:
        config = {"architectures": [family.architecture], **config}
    readers = tuple(reader.note for reader in (wrapper, packing) if reader is not None)
    if config.get("model_type") in ALIASES:
        readers += (
            f"model_type {config['model_type']} is read as {family.model_type}; transformers has no code for it",
        )
    notes = (*notes, *container_notes(directory), *readers)
    return CheckpointDescription(directory, config, family, spec, notes, wrapper, packing)
