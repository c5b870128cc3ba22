"""The dtype of forward passes on the machine at hand."""

from typing import TypeVar

from tmjax import backend
from tmjax.recipes.adapt import AdaptRecipe
from tmjax.recipes.merge import Recipe

R = TypeVar("R", Recipe, AdaptRecipe)


def with_dtype(recipe: R) -> R:
    """Returns the recipe with the dtype that `auto` means here: bfloat16 on accelerators, float32 on a CPU.

    A run's own recipe has that dtype, so that the run does not go on in another one on another machine.
    """
    if recipe.dtype != "auto":
        return recipe
    return recipe.model_copy(update={"dtype": "float32" if backend.platform() == "cpu" else "bfloat16"})
