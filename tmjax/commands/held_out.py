"""Texts of a merge or an adaptation that nothing is fitted on, read when first used."""

import functools

from tmjax.recipes.base import Placed
from tmjax.text.documents import Texts, read_texts


class HeldOut:
    """Validation, test and other texts of a recipe."""

    def __init__(self, recipe: Placed) -> None:
        self.recipe = recipe

    @functools.cached_property
    def valid(self) -> Texts | None:
        """The texts on which choices are made: coefficients, steps, learning rates."""
        return read_texts(self.recipe.place(self.recipe.valid)) if self.recipe.valid else None

    @functools.cached_property
    def test(self) -> Texts | None:
        """The texts on which the result is measured, once."""
        return read_texts(self.recipe.place(self.recipe.test)) if self.recipe.test else None

    @functools.cached_property
    def other_texts(self) -> dict[str, Texts]:
        """Texts of other languages or domains, by the names of their files."""
        return {name: read_texts(self.recipe.place(name)) for name in self.recipe.other_texts}
