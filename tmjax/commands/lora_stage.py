"""The stage of a merge or an adaptation that writes the change of the target as a LoRA, `export: {lora: RANK}`."""

from pathlib import Path

from tmjax.checkpoints.hub import is_adapter, resolve
from tmjax.checkpoints.lora_export import write_difference
from tmjax.checkpoints.orbax import is_orbax
from tmjax.errors import InputError
from tmjax.recipes.base import ExportOptions
from tmjax.runs.directory import RunDirectory
from tmjax.runs.manifest import Record
from tmjax.runs.run_facts import LoraFacts
from tmjax.sharding import hosts

#: Folder of the adapter in a run directory.
LORA = "lora"


def require_exportable(options: ExportOptions, target: str, place: str) -> None:
    """Raises InputError if a LoRA is to be written and the target is no model that PEFT adapts.

    Args:
        options: Settings of the export.
        target: The target's name in the recipe.
        place: Its directory or hub id.
    """
    if options.lora is None:
        return
    directory = resolve(place)
    kind = "an orbax checkpoint" if is_orbax(directory) else "an adapter itself" if is_adapter(directory) else None
    if kind is not None:
        raise InputError(
            f"export.lora: the target {target} is {kind}; write it as a model first: tmjax convert {target} OUT --to hf"
        )


def export_as_lora(
    run: RunDirectory, options: ExportOptions, key: object, *, target: str, place: str, result: Path
) -> None:
    """Writes the change of the target as a LoRA into `lora/`, and its errors into the manifest, unless that is done.

    Args:
        run: The run directory.
        options: Settings of the export; nothing is done without a rank.
        key: Input hash of the result.
        target: The target's name, which the adapter has for its base model.
        place: The target's directory or hub id.
        result: Checkpoint of the result.

    Raises:
        InputError: No projection changed.
    """
    rank = options.lora
    if rank is None:
        return

    def work(partial: Path) -> Record | None:
        if not hosts.is_first():
            return None
        try:
            done = write_difference(resolve(place), result, partial, rank=rank, base_name=target)
        except InputError as error:
            raise InputError(f"export.lora: {error} (without export.lora the same command finishes the run)") from None
        facts = LoraFacts(rank=rank, errors=done.errors, left_out=done.left_out)
        return lambda manifest: setattr(manifest, "lora", facts)

    run.stage("lora", [key, rank], LORA, work)
