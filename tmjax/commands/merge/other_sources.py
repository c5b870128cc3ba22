"""Rows beside the controls: the same merge from the target itself and from a source of the target's size."""

from pathlib import Path

from tmjax.recipes.merge import Recipe
from tmjax.recipes.sources import WITHOUT, by_key

#: Arms, in the order of their rows, beside those without one of several sources.
SELF, SAME_SIZE = "self_source", "same_size_source"


def other_sources(recipe: Recipe) -> dict[str, Recipe]:
    """Returns recipes of runs inside the run directory, by arm; none unless controls are run.

    They are no controls and do not enter the gain due to the source. `self_source` measures the procedure without
    another model, `same_size_source` measures it with a source that is no larger than the target. Of several sources
    each is left out once.
    """
    if not recipe.controls:
        return {}
    named = {SELF: recipe.target if recipe.self_source else None, SAME_SIZE: recipe.same_size_source}
    plain = {"controls": False, "same_size_source": None, "allow_negligible": True, "test": None, "other_texts": ()}
    own = {arm: {"source": name, "sources": ()} for arm, name in named.items() if name is not None}
    for left_out in by_key(recipe.sources):
        rest = tuple(entry for name, entry in by_key(recipe.sources).items() if name != left_out)
        own[f"{WITHOUT}{left_out}"] = {"source": rest[0].source, "sources": rest if len(rest) > 1 else ()}
    return {
        arm: recipe.model_copy(update={**plain, **update, "out": str(Path(recipe.out) / folder_of(arm))})
        for arm, update in own.items()
    }


def folder_of(arm: str) -> str:
    """Returns the folder, in a run directory, of the run of an arm."""
    return f"sources/{arm.removeprefix('control:')}"
