"""Input hashes of steps: settings, inputs, and the hash of the model that a step begins with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmjax.checkpoints.hub import COMPANIONS, resolve
from tmjax.commands.steps.resolve import Step, names_model
from tmjax.errors import InputError
from tmjax.recipes.steps_recipe import REFERENCE
from tmjax.runs.hashes import digest, sha256_checkpoint, sha256_files
from tmjax.runs.manifest import load_manifest
from tmjax.train.texts import read_training_texts

#: Settings that change no model: places, and what is measured or written beside it.
_BESIDE = {"out", "places", "mesh", "allow_negligible", "self_source", "same_size_source", "other_texts"}


@dataclass(frozen=True)
class StepKey:
    """Hashes of a step: of everything that its model depends on, and of everything that its directory depends on."""

    model: str
    whole: str


def step_keys(steps: Sequence[Step]) -> tuple[list[StepKey], dict[str, tuple[str, str]]]:
    """Hashes the steps, before any of them runs.

    Args:
        steps: The resolved steps, with `step:N` for the models of earlier ones.

    Returns:
        The hashes of every step, and name and SHA-256 of every input, by step and key.

    Raises:
        InputError: An input does not exist, or cannot be read; names the step.
    """
    keys: list[StepKey] = []
    inputs: dict[str, tuple[str, str]] = {}
    known: dict[tuple[str, str], str] = {}
    for step in steps:
        hashes: dict[str, str] = {}
        for key, name in step.inputs().items():
            reference = REFERENCE.fullmatch(name)
            if reference is not None:
                hashes[key] = keys[int(reference[1]) - 1].model
                continue
            place = _place(step, name)
            try:
                hashes[key] = known[key, place] = known.get((key, place)) or _sha256(key, place)
            except InputError as error:
                raise InputError(f"{step.name}: {key}: {error}") from None
            inputs[f"{step.name}.{key}"] = name, hashes[key]
        keys.append(_key(step, hashes))
    return keys, inputs


def _key(step: Step, hashes: Mapping[str, str]) -> StepKey:
    values = {key: value for key, value in step.dump().items() if key not in _BESIDE and key not in hashes}
    lora = values.get("export", {}).pop("lora", None)
    of_model = {key: value for key, value in hashes.items() if key.partition(".")[0] not in _BESIDE}
    # Such a step hands on the model that it was given.
    begins = hashes["target"] if not step.makes_model else digest([step.kind, values, of_model])
    further: list[Any] = [step.kind, values, dict(hashes), lora, getattr(step.settings, "self_source", None)]
    return StepKey(begins, digest(further))


def _place(step: Step, name: str) -> str:
    place = getattr(step.settings, "place", None)
    return name if place is None else place(name)


def _sha256(key: str, place: str) -> str:
    """Returns the hash of an input: a checkpoint or a run, a tokenizer, a folder of tasks, a file of code, texts."""
    if key == "tokenizer":
        directory = resolve(place, weights=False)
        return sha256_files([directory / name for name in COMPANIONS if (directory / name).is_file()])
    if names_model(key):
        manifest = load_manifest(Path(place).expanduser())
        if manifest is not None:
            return digest(manifest.to_json({"outputs"})["outputs"])
        return sha256_checkpoint(resolve(place))
    if key == "tasks_dir":
        return _folder(Path(place).expanduser())
    if key.startswith("operators.") or key == "alignment.solver":
        return sha256_files([Path(place).expanduser()])
    return read_training_texts(place).texts.sha256


def _folder(path: Path) -> str:
    if not path.is_dir():
        raise InputError(f"{path} is no folder")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest({file.relative_to(path).as_posix(): sha256_files([file]) for file in files})
