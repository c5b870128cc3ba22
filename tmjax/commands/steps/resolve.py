"""Steps of a recipe with all their settings, and where the model of each lies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from tmjax.errors import InputError
from tmjax.recipes.adapt import AdaptRecipe, build_adapt_recipe
from tmjax.recipes.base import checked, merged_values
from tmjax.recipes.merge import Recipe
from tmjax.recipes.sources import SOURCE
from tmjax.recipes.steps_recipe import (
    PLAIN_STEPS,
    REFERENCE,
    SHARED,
    ConvertStep,
    EvaluateStep,
    StepsRecipe,
    VocabularyStep,
)
from tmjax.runs.provenance import MERGED
from tmjax.transfer.recipe import build_recipe
from tmjax.transplant.initialisers import find_initialiser

Settings: TypeAlias = Recipe | AdaptRecipe | VocabularyStep | ConvertStep | EvaluateStep
#: Keys that name models, which may be those of earlier steps.
MODELS = ("target", "source", "same_size_source", "tokenizer", "base")


def names_model(key: str) -> bool:
    """Whether an input of a recipe is a model, by its key; of several sources the second is `source-2`."""
    return key in MODELS or key.startswith(f"{SOURCE}-") or key.endswith(".base")


#: Keys of a step that are paths of its own, beside those of a merge.
_PATHS = (*MODELS, "texts", "test", "tasks_dir")
#: Keys that an error calls by their present names.
_RENAMED = {"evaluate": {"texts": "test", "models": "target"}, "vocabulary": {"multiple": "multiple_of"}}


@dataclass(frozen=True)
class Step:
    """A step: its number, its kind and its settings. The settings of merges and adaptations are whole recipes."""

    number: int
    kind: str
    settings: Settings

    @property
    def name(self) -> str:
        """The name of the step, which is that of its directory."""
        return f"{self.number}-{self.kind}"

    @property
    def is_run(self) -> bool:
        """Whether the step is a run of its own, whose result can be published."""
        return self.kind in ("merge", "adapt")

    @property
    def makes_model(self) -> bool:
        """Whether the steps after this one go on with another model than this one had."""
        return self.kind != "evaluate" and getattr(self.settings, "to", None) != "lora"

    def inputs(self) -> dict[str, str]:
        """Returns the names of the inputs, by their keys."""
        if isinstance(self.settings, Recipe | AdaptRecipe):
            return self.settings.inputs()
        named = {key: getattr(self.settings, key, None) for key in _PATHS}
        return {key: name for key, name in named.items() if name is not None}

    def dump(self) -> dict[str, Any]:
        """Returns the settings as plain values, as they stand in a recipe."""
        values = self.settings.model_dump(mode="json")
        return {key: value for key, value in values.items() if key not in ("out", "places")}


def resolve_steps(recipe: StepsRecipe, base: Path | None = None) -> tuple[tuple[Step, ...], list[str]]:
    """Resolves the steps of a recipe: shared inputs, presets, defaults.

    Args:
        recipe: The recipe.
        base: Folder of the recipe file. Relative paths of local files are taken relative to it, if they exist there.

    Returns:
        The steps, in which `step:N` stands for the model of an earlier one, and keys of the recipe that are missing.

    Raises:
        InputError: A setting is wrong; names the step.
    """
    steps, missing = [], []
    for number, entry in enumerate(recipe.steps, 1):
        ((kind, own),) = entry.items()
        try:
            values = _shared(recipe, kind, own, number)
            absent = [key for key in _required(kind, own) if values.get(key) is None]
            settings = _settings(kind, values | dict.fromkeys(absent, "-"), f"{recipe.out}/{number}-{kind}", base)
        except InputError as error:
            raise InputError(f"recipe: steps.{number}.{kind}: {str(error).removeprefix('recipe: ')}") from None
        missing += absent
        steps.append(Step(number, kind, settings))
        for key, name in steps[-1].inputs().items():
            reference = REFERENCE.fullmatch(name)
            if reference and getattr(settings, "sources", ()) and key != "target":
                raise InputError(
                    f"recipe: steps.{number}.{kind}.sources: {name} is no checkpoint, and several sources are"
                )
            if reference and (key not in MODELS or int(reference[1]) >= number):
                raise InputError(f"recipe: steps.{number}.{kind}.{key}: {name} is not the model of an earlier step")
    return tuple(steps), list(dict.fromkeys(missing))


def _shared(recipe: StepsRecipe, kind: str, own: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Returns the values of a step with those that it takes over from the recipe."""
    shared = {key: getattr(recipe, key) for key in SHARED[kind] if key != SOURCE or not own.get("sources")}
    shared["target"] = recipe.target if number == 1 else f"step:{number - 1}"
    init = own.get("init", "mean")
    if kind == "vocabulary" and find_initialiser(str(init)).needs_source:
        shared["source"] = recipe.source
    return {key: value for key, value in shared.items() if value not in (None, ())} | dict(own)


def _required(kind: str, own: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the inputs without which there is no step; the recipe or flags may give them."""
    further = {
        "merge": ("texts",) if own.get("sources") else ("source", "texts"),
        "adapt": ("texts",),
        "vocabulary": ("texts",) if own.get("add") is not None else (),
        "evaluate": () if own.get("tasks") else ("test",),
    }
    return ("target", *further.get(kind, ()))


def _settings(kind: str, values: dict[str, Any], out: str, base: Path | None) -> Settings:
    """Builds the settings of a step, and checks what needs no input."""
    if kind == "merge":
        return build_recipe(values | {"out": out}, base=base)
    if kind == "adapt":
        return build_adapt_recipe(values | {"out": out}, base=base)
    if isinstance(values.get("tasks"), str):
        values["tasks"] = [name.strip() for name in values["tasks"].split(",") if name.strip()]
    settings = checked(PLAIN_STEPS[kind], values, _RENAMED.get(kind))
    if isinstance(settings, ConvertStep) and (settings.base is not None) != (settings.to == "lora"):
        raise InputError("`to: lora` needs `base`, the model that the adapter belongs to; other forms have none")
    named = {key: getattr(settings, key) for key in _PATHS if getattr(settings, key, None) is not None}
    if base is None:
        return settings
    near = {key: str(base / name) for key, name in named.items() if not Path(name).exists() and (base / name).exists()}
    return settings.model_copy(update=near)


def resolved_values(recipe: StepsRecipe, steps: Sequence[Step], without: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the recipe with every setting of every step, as plain values; it is a recipe again.

    Args:
        recipe: The recipe.
        steps: Its resolved steps.
        without: Keys that are left out, because they have no value yet.
    """
    values = recipe.model_dump(mode="json", exclude={"places", "steps", *without})
    own = [
        {step.kind: {key: value for key, value in step.dump().items() if value != "-" or key not in without}}
        for step in steps
    ]
    return merged_values(values, {"steps": own})


def located(steps: Sequence[Step], out: Path) -> tuple[Step, ...]:
    """Returns the steps with the places of models in a run directory for `step:N`.

    An adaptation of a merge's residual takes the merge itself, with its alignment; others take its checkpoint.
    """
    results: list[Step] = []
    for step in steps:
        places = {}
        for key, name in step.inputs().items():
            reference = REFERENCE.fullmatch(name)
            if reference is None:
                continue
            other = results[int(reference[1]) - 1]
            whole = key == "target" and getattr(step.settings, "merges", False) and other.kind == "merge"
            places[key] = str(out / other.name) if whole else model_place(results, other, out)
        results.append(replace(step, settings=step.settings.model_copy(update=places)))
    return tuple(results)


def model_place(steps: Sequence[Step], step: Step, out: Path) -> str:
    """Returns the place of a step's model: in the run directory, or where the model lies that it only reads.

    Args:
        steps: The located steps up to this one.
        step: The step.
        out: The run directory.
    """
    if not step.makes_model:
        return str(step.settings.target)
    return str(out / step.name / MERGED if step.is_run else out / step.name)
