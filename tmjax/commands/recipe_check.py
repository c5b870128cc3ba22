"""`tmjax recipe check`: the recipe that a file stands for, and the stages of its run, before anything runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from tmjax.checkpoints.hub import is_hub_id
from tmjax.commands.adapt.arms import Arm, arms_of, data_name, stand_in
from tmjax.commands.adapt.inputs import AdaptInputs
from tmjax.commands.merge.inputs import Inputs
from tmjax.commands.merge.other_sources import folder_of, other_sources
from tmjax.commands.steps.resolve import Step, names_model, resolve_steps, resolved_values
from tmjax.commands.steps.work import check_step
from tmjax.errors import InputError
from tmjax.recipes.adapt import AdaptRecipe, build_adapt_recipe, is_adaptation
from tmjax.recipes.base import Placed, read_recipe
from tmjax.recipes.merge import Recipe
from tmjax.recipes.sources import SOURCE
from tmjax.recipes.steps_recipe import REFERENCE, build_steps_recipe, has_steps
from tmjax.runs.provenance import STAGE
from tmjax.transfer.chain import chain_of, needs_of
from tmjax.transfer.controls import CONTROLS
from tmjax.transfer.recipe import build_recipe

Kind = Literal["merge", "adapt", "run"]
#: Keys without which there is no run; the command line may give them.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "merge": ("source", "target", "texts", "out"),
    "adapt": ("target", "texts", "out"),
}


def check_recipe(file: Path, kind: Kind | None = None) -> dict[str, Any]:
    """Reads a recipe as a run would, and checks everything that needs no weights.

    Args:
        file: The recipe.
        kind: The command that it is for; by its keys unless given.

    Returns:
        `file`, `kind`, the resolved `recipe` with every default, required keys that are `missing` and have to be flags,
        and the `stages` of a run in order.

    Raises:
        InputError: The recipe is wrong, or a local input does not exist.
    """
    values = read_recipe(file)
    chosen = kind or ("run" if has_steps(values) else "adapt" if is_adaptation(values) else "merge")
    if chosen == "run":
        return _check_steps(file, values)
    missing = [name for name in _REQUIRED[chosen] if values.get(name) is None]
    if values.get("sources"):
        missing = [name for name in missing if name != "source"]
    filled = dict.fromkeys(missing, "-") | {name: value for name, value in values.items() if name not in missing}
    recipe: Recipe | AdaptRecipe
    if chosen == "adapt":
        recipe = build_adapt_recipe(filled, base=file.parent)
    else:
        recipe = build_recipe(filled, base=file.parent)
    _require_inputs(recipe.inputs(), recipe, missing)
    if isinstance(recipe, Recipe):
        Inputs(recipe).check_settings()
        stages = merge_stages(recipe)
    else:
        stages = _checked_adaptation(recipe, missing)
    resolved = recipe.model_dump(mode="json", exclude={"places", *missing})
    return {"file": str(file), "kind": chosen, "recipe": resolved, "missing": missing, "stages": stages}


def as_yaml(checked: dict[str, Any]) -> str:
    """Returns the resolved recipe as YAML, with the stages and missing keys as comments."""
    lines = [f"# tmjax {checked['kind']} {checked['file']}", f"# stages: {', '.join(checked['stages'])}"]
    if checked["missing"]:
        lines.append(f"# still to be given: {', '.join(f'--{name}' for name in checked['missing'])}")
    return "\n".join([*lines, yaml.safe_dump(checked["recipe"], sort_keys=False, allow_unicode=True)])


def _check_steps(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Checks a recipe of several steps; see `check_recipe`."""
    without_out = ["out"] if values.get("out") is None else []
    recipe = build_steps_recipe(values | dict.fromkeys(without_out, "-"), base=file.parent)
    steps, absent = resolve_steps(recipe, file.parent)
    missing = [*absent, *without_out]
    for step in steps:
        try:
            _require_inputs(step.inputs(), step.settings, absent)
            check_step(step)
        except InputError as error:
            message = str(error).removeprefix("recipe: ")
            raise InputError(f"recipe: steps.{step.number}.{step.kind}: {message}") from None
    resolved = resolved_values(recipe, steps, missing)
    stages = [stage for step in steps for stage in _step_stages(step)]
    return {"file": str(file), "kind": "run", "recipe": resolved, "missing": missing, "stages": stages}


def _step_stages(step: Step) -> list[str]:
    """Returns the stages of a step: those of its own run, or the step alone."""
    settings, stages = step.settings, []
    if isinstance(settings, Recipe):
        stages = merge_stages(settings)
    elif isinstance(settings, AdaptRecipe):
        stages = _checked_adaptation(settings, [])
    return [f"{step.name}/{stage}" for stage in stages] or [step.name]


def _require_inputs(inputs: Mapping[str, str], settings: object, missing: Sequence[str]) -> None:
    """Raises InputError for local inputs that do not exist."""
    for key, name in inputs.items():
        elsewhere = is_hub_id(name) if names_model(key) else name.startswith("hf:")
        if key in missing or elsewhere or REFERENCE.fullmatch(name):
            continue
        place = settings.place(name) if isinstance(settings, Placed) else name
        if not Path(place).expanduser().exists():
            raise InputError(f"recipe: {key} {name} does not exist")


def _checked_adaptation(recipe: AdaptRecipe, missing: list[str]) -> list[str]:
    """Checks the settings of an adaptation, and of the merge that it needs; returns its stages."""
    inputs = AdaptInputs(recipe)
    inputs.check_settings()
    stages = adapt_stages(recipe)
    if inputs.run is not None or not recipe.merges:
        return stages
    merge = inputs.merge_recipe()
    Inputs(merge).check_settings()
    own = merge_stages(merge)
    return [*(f"merge/{name}" for name in own[: own.index("fuse") + 1]), *stages]


def merge_stages(recipe: Recipe) -> list[str]:
    """Returns the stages of a merge as its manifest names them; controls stand for all that is made for them."""
    chain = chain_of(recipe)
    needs, stages = needs_of(chain), []
    if needs & {"alignment", "activations"}:
        keep = recipe.activations.keep
        stages += ["activations:target", "activations:source"] if keep else ["moments:source"]
    if "alignment" in needs:
        stages.append("alignment")
    if "teacher" in needs:
        count = max(getattr(step.options, "generated_texts", 0) for step in chain if "teacher" in step.operator.needs)
        sources = [SOURCE, *recipe.further_sources]
        stages += ["edges" if source == SOURCE else f"edges:{source}" for source in sources]
        if recipe.sources and recipe.mixing == "prediction":
            stages += [f"teacher:{source}-on-given" for source in sources]
        stages += [f"generate:{source}" for source in sources if count]
        stages += [f"teacher:{source}" for source in sources]
    stages.append("fuse")
    if recipe.controls:
        stages += CONTROLS
    stages += [folder_of(arm) for arm in other_sources(recipe)]
    return [*stages, *_last_stages(recipe, recipe.test, samples=True)]


def adapt_stages(recipe: AdaptRecipe) -> list[str]:
    """Returns the stages of an adaptation as its manifest names them, without those of a merge that it needs."""
    stages = ["budget"] if recipe.budgeted else []
    for name, arm in arms_of(recipe).items():
        stages += [*_data_stages(recipe, arm), f"train:{name}"]
    return list(dict.fromkeys([*stages, *_last_stages(recipe, recipe.test)]))


def _data_stages(recipe: AdaptRecipe, arm: Arm) -> list[str]:
    """Returns the stages of the sources' part in the data of an arm.

    With `mixing: prediction` a source that predicts badly may generate no text, and so have no stage.
    """
    every = list(recipe.named_sources) or [SOURCE]
    sources = [name for name in every if name != arm.without]
    asked = arm.terms & {"generated", "distillation"}
    stages = ["edges" if source == SOURCE else f"edges:{source}" for source in sources if asked]
    if asked and recipe.mixing == "prediction" and len(sources) > 1:
        stages += [f"teacher:{source}" for source in sources]
    if arm.texts_by is not None:
        ending = f"-without-{arm.without}" if arm.without else ""
        models = ["target"] if arm.texts_by == "target" else [stand_in(arm.teacher, source) for source in sources]
        stages += [f"generate:{name}{ending}" for name in [*sources, *models]]
    if "guidance" in arm.terms:
        stages += [f"features:{data_name(model, arm)}" for model in (arm.teacher, "target")]
    if "distillation" in arm.terms:
        stages += [f"teacher:{data_name(stand_in(arm.teacher, source), arm)}" for source in sources]
    return stages


def _last_stages(recipe: Recipe | AdaptRecipe, test: str | None, *, samples: bool = False) -> list[str]:
    """Returns the stages that follow all checkpoints."""
    chosen = {
        "evaluate": test is not None,
        "forgetting": bool(recipe.other_texts),
        "lora": recipe.export.lora is not None,
        "samples": samples,
    }
    return [*(name for name, runs in chosen.items() if runs), "card", "report", STAGE]
