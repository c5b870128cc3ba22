"""Recipes of merges from plain values: presets, operators with all their options, files near the recipe."""

from pathlib import Path
from typing import Any

from tmjax.errors import InputError
from tmjax.plugins import beside
from tmjax.recipes.base import checked, found_near, merged_values
from tmjax.recipes.merge import Recipe
from tmjax.recipes.old_keys import refuse_old_keys
from tmjax.recipes.presets import DEFAULT_PRESET, PRESETS
from tmjax.recipes.sources import first_as_source, require_different, with_mixing
from tmjax.recipes.steps_recipe import refuse_steps
from tmjax.transfer.operator import operators_of


def build_recipe(values: dict[str, Any], *, base: Path | None = None) -> Recipe:
    """Builds the recipe of a merge.

    Args:
        values: Keys as in a recipe file, nested. They replace those of their preset, `predictions` by default.
        base: Folder of the recipe file. Relative paths of local files are taken relative to it, if they exist there.

    Returns:
        The recipe, every option of every operator spelled out.

    Raises:
        InputError: A key, value, preset or operator is wrong; all faults of a section in one line.
    """
    refuse_old_keys(values)
    refuse_steps(values)
    values = with_mixing(first_as_source(values))
    preset = values.get("preset", DEFAULT_PRESET)
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r} is not known; known are {', '.join(PRESETS)}")
    merged = merged_values(PRESETS[preset], values | {"preset": preset})
    if isinstance(merged.get("operators"), list | tuple):
        merged["operators"] = [_entry(entry, base) for entry in merged["operators"]]
    alignment = merged.get("alignment")
    if isinstance(alignment, dict) and isinstance(alignment.get("solver"), str):
        merged["alignment"] = alignment | {"solver": beside(alignment["solver"], base)}
    recipe = checked(Recipe, merged)
    require_different({}, recipe.sources)
    if len(recipe.sources) == 1:
        recipe = recipe.model_copy(update={"sources": ()})
    names = [next(iter(entry)) for entry in recipe.operators]
    steps = operators_of(recipe)
    operators = tuple({name: step.options.model_dump(mode="json")} for name, step in zip(names, steps, strict=True))
    recipe = recipe.model_copy(update={"operators": operators})
    return recipe if base is None else found_near(recipe, base)


def _entry(entry: Any, base: Path | None) -> Any:
    """An operator of a list as a mapping; a file of an operator that lies beside the recipe is named from there."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        return entry
    ((name, options),) = entry.items()
    return {beside(str(name), base): {} if options is None else options}
