"""Groups of settings that share activations, plans and transported weights, and differ in coefficients alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from tmjax.commands.sweep.grid import Setting, is_part, recipe_of
from tmjax.recipes.merge import Recipe

#: Keys that affect the coefficients of a fusion alone, and `seed`, which draws the settings of a sweep.
NUMBERS = frozenset({"alpha", "beta", "coefficients.beta", "seed"})


@dataclass(frozen=True)
class Group:
    """Numbers of the settings that differ in coefficients alone, and the recipe that they share."""

    recipe: Recipe
    members: tuple[int, ...]


def make_groups(recipe: Recipe, settings: Sequence[Setting]) -> list[Group]:
    """Groups settings so that activations change least often from group to group, then alignment, then transport."""
    recipes: dict[tuple[str, ...], Recipe] = {}
    members: dict[tuple[str, ...], list[int]] = {}
    for number, setting in enumerate(settings):
        shared = {key: value for key, value in setting.items() if key not in NUMBERS and not is_part(key)}
        name = tuple(map(repr, shared.items()))
        if name not in recipes:
            recipes[name] = recipe_of(recipe, shared)
        members.setdefault(name, []).append(number)
    groups = [Group(recipes[name], tuple(numbers)) for name, numbers in members.items()]

    def first(part: list[str]) -> int:
        return seen.setdefault(str(part), len(seen))

    seen: dict[str, int] = {}
    keyed = []
    for group in groups:
        values = group.recipe.model_dump(mode="json")
        options = [(name, options) for entry in values["operators"] for name, options in entry.items()]
        roles = [own.get("roles") for _, own in options]
        activations = [values["dtype"], values["activations"], roles]
        alignment = [*activations, values["alignment"]]
        unmasked = [(name, {key: x for key, x in own.items() if key != "mask_top_k"}) for name, own in options]
        transport = [*alignment, unmasked]
        keyed.append(tuple(first(part) for part in (activations, alignment, transport)))
    return [group for _, group in sorted(zip(keyed, groups, strict=True), key=lambda item: item[0])]
