"""Rows beside the controls: the same merge from the target itself and from a source of the target's size."""

from pathlib import Path

from tmjax.recipes.merge import Recipe

#: Arms, in the order of their rows.
SELF, SAME_SIZE = "self_source", "same_size_source"


def other_sources(recipe: Recipe) -> dict[str, Recipe]:
    """Returns recipes of runs inside the run directory, by arm; none unless controls are run.

    They are no controls and do not enter the gain due to the source. `self_source` measures the procedure without
    another model, `same_size_source` measures it with a source that is no larger than the target.
    """
    if not recipe.controls:
        return {}
    named = {SELF: recipe.target if recipe.self_source else None, SAME_SIZE: recipe.same_size_source}
    plain = {"controls": False, "same_size_source": None, "allow_negligible": True, "test": None, "other_texts": ()}
    return {
        arm: recipe.model_copy(update={**plain, "source": name, "out": str(Path(recipe.out) / "sources" / arm)})
        for arm, name in named.items()
        if name is not None
    }
