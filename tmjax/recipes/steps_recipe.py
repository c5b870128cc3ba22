"""The recipe of several steps: shared inputs, and the steps in order, each with the settings of its command."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tmjax.errors import InputError
from tmjax.recipes.base import Placed, Positive, Section, checked, found_near

#: A model of a recipe that is the result of an earlier step, by its number.
REFERENCE = re.compile(r"step:([1-9]\d*)")

Seed = Annotated[int, Field(ge=0, description="Seed of everything random.")]
Mesh = Annotated[str | None, Field(description="Device mesh; chosen over all devices unless given.")]
ShardSize = Annotated[str, Field(description="Largest file of weights; a larger checkpoint is written as several.")]


class VocabularyStep(Section):
    """Another tokenizer, or more tokens, as `tmjax vocabulary` makes them."""

    target: Annotated[str, Field(description="Model whose vocabulary changes; that of the step before unless given.")]
    tokenizer: Annotated[str | None, Field(description="The new tokenizer: directory or hub id.")] = None
    add: Annotated[Positive | None, Field(description="Number of tokens that are learnt from `texts` instead.")] = None
    texts: Annotated[str | None, Field(description="Texts of the language or domain.")] = None
    init: Annotated[str, Field(description="Initialisation of new rows: `mean`, `similar`, `source` or `pursuit`.")] = (
        "mean"
    )
    source: Annotated[
        str | None,
        Field(description="A model that knows the new tokens; that of the recipe where the initialisation needs one."),
    ] = None
    multiple_of: Annotated[Positive, Field(description="Rows are padded to a multiple of this.")] = 1
    max_shard_size: ShardSize = "5GB"


class ConvertStep(Section):
    """Another form of the model, as `tmjax convert` writes it.

    The steps after a LoRA go on with the model that it was made from.
    """

    target: Annotated[str, Field(description="Model that is converted; that of the step before unless given.")]
    to: Annotated[
        Literal["hf", "orbax", "lora"],
        Field(description="Form: Hugging Face's, orbax, or the difference from `base` as a PEFT adapter."),
    ]
    base: Annotated[str | None, Field(description="Model that a LoRA belongs to.")] = None
    rank: Annotated[Positive, Field(description="Rank of every projection's update in a LoRA.")] = 32
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Field(description="Dtype of all parameters; as stored if null."),
    ] = None
    max_shard_size: ShardSize = "5GB"


class EvaluateStep(Section):
    """Scores of the model, as `tmjax evaluate` measures them. The steps after it go on with the same model."""

    target: Annotated[str, Field(description="Model that is scored; that of the step before unless given.")]
    test: Annotated[str | None, Field(description="Held-out texts, for bits per byte.")] = None
    tasks: Annotated[tuple[str, ...], Field(description="Tasks of lm-eval.")] = ()
    tasks_dir: Annotated[str | None, Field(description="Folder of your own tasks (YAML) and their data files.")] = None
    num_fewshot: Annotated[
        int | None, Field(ge=0, description="Examples before a question; the task's number if null.")
    ] = None
    limit: Annotated[Positive | None, Field(description="Largest number of documents of a task; all if null.")] = None
    chat_template: Annotated[
        bool, Field(description="Whether tasks are asked as conversations in the tokenizer's chat format.")
    ] = False
    draws: Annotated[Positive, Field(description="Bootstrap draws of an interval.")] = 10000
    seed: Seed = 0
    mesh: Mesh = None


#: Sections of the steps that have no recipe of their own.
PLAIN_STEPS: Mapping[str, type[VocabularyStep | ConvertStep | EvaluateStep]] = {
    "vocabulary": VocabularyStep,
    "convert": ConvertStep,
    "evaluate": EvaluateStep,
}
KINDS = ("vocabulary", "merge", "adapt", "convert", "evaluate")
#: Keys of the recipe that a step of each kind takes over unless it has its own.
SHARED: Mapping[str, tuple[str, ...]] = {
    "vocabulary": ("texts",),
    "merge": ("source", "texts", "valid", "test", "other_texts", "seed", "mesh"),
    "adapt": ("source", "texts", "valid", "test", "other_texts", "seed", "mesh"),
    "convert": (),
    "evaluate": ("test", "seed", "mesh"),
}


class StepsRecipe(Placed):
    """Several steps of one run. Steps share the inputs, the seed and the mesh, and each may have others of its own.

    Model names are directories or hub ids; texts are files or `hf:NAME[:split[:field]]`.
    """

    source: Annotated[str | None, Field(description="Source checkpoint of merges and adaptations.")] = None
    target: Annotated[str | None, Field(description="Target of the first step.")] = None
    texts: Annotated[
        str | None, Field(description="Calibration texts, training texts, texts that new tokens are learnt from.")
    ] = None
    valid: Annotated[str | None, Field(description="Texts on which choices are made.")] = None
    test: Annotated[str | None, Field(description="Texts on which the model of every step is measured.")] = None
    other_texts: Annotated[
        tuple[str, ...],
        Field(description="Texts of other languages or domains, on which target and result are scored too."),
    ] = ()
    out: Annotated[str, Field(description="Run directory.")]
    seed: Seed = 0
    mesh: Mesh = None
    steps: Annotated[
        tuple[dict[str, dict[str, Any]], ...],
        Field(
            min_length=1,
            description="Steps in order: `vocabulary`, `merge`, `adapt`, `convert` or `evaluate`, each with the "
            "settings of its command. A step without `target` takes the model of the step before; `step:2` is the "
            "model of the second step.",
        ),
    ]
    places: Annotated[
        dict[str, str],
        Field(
            default_factory=dict, description="Written with a run: absolute places of its local inputs, by their names."
        ),
    ]


def has_steps(values: Mapping[str, Any]) -> bool:
    """Whether values are those of a recipe of several steps."""
    return "steps" in values


def refuse_steps(values: Mapping[str, Any]) -> None:
    """Raises InputError for the values of a recipe of several steps, which one command alone runs."""
    if has_steps(values):
        raise InputError("recipe: steps are run by `tmjax run`; other commands take a recipe without them")


def build_steps_recipe(values: dict[str, Any], *, base: Path | None = None) -> StepsRecipe:
    """Builds the recipe of several steps; the settings of a step are checked when it is resolved.

    Args:
        values: Its values, nested as in a recipe file.
        base: Folder of the recipe file. Relative paths of local files are taken relative to it, if they exist there.

    Returns:
        The recipe.

    Raises:
        InputError: Values are wrong, keys unknown, or a step is none.
    """
    steps = values.get("steps")
    if not isinstance(steps, list | tuple):
        raise InputError("recipe: steps is a list, of steps such as `- merge: {preset: quick}`")
    entries = [_entry(number, entry) for number, entry in enumerate(steps, 1)]
    recipe = checked(StepsRecipe, values | {"steps": entries})
    return recipe if base is None else found_near(recipe, base)


def _entry(number: int, entry: Any) -> dict[str, Any]:
    """Returns a step as a mapping of its kind to its settings."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        shown = ", ".join(map(str, entry)) if isinstance(entry, dict) else entry
        raise InputError(f"recipe: steps.{number} has to be one step with its settings, not {shown or 'nothing'}")
    ((kind, settings),) = entry.items()
    if kind not in KINDS:
        raise InputError(f"recipe: steps.{number}: {kind!r} is no step; steps are {', '.join(KINDS)}")
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise InputError(f"recipe: steps.{number}.{kind} has to be a mapping of settings, not {settings}")
    if "out" in settings:
        raise InputError(f"recipe: steps.{number}.{kind}.out: a step has its place in the run directory; leave it out")
    return {kind: settings}
