"""Rows beside the controls: the same merge from other sources, the target itself and one of the target's size."""

from pathlib import Path

from tmjax.recipes.merge import Recipe

#: Arms, in the order of their rows.
SELF, SAME_SIZE = "self_source", "same_size_source"


def other_sources(recipe: Recipe) -> dict[str, Recipe]:
    """By arm, the recipe of a run of its own inside the run directory; none unless controls are wanted.

    They are no controls: neither enters the gain due to the source. `self_source` says what the procedure does to the
    target without another model, `same_size_source` what a source brings that is no larger than the target.
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
