"""Sources of a recipe: one, or several with weights."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from tmjax.errors import InputError
from tmjax.recipes.base import PositiveFloat, Section

#: Name of the first source in stages, inputs and arms; the others are `source-2`, `source-3`.
SOURCE = "source"
#: Beginning of the names of arms without one of several sources; their data are those of the others.
WITHOUT = "control:without_"
#: How predictions of several sources are mixed.
Mixing = Literal["weights", "prediction"]
MixingKey = Annotated[
    Mixing,
    Field(
        description="Probabilities of several sources are mixed by `prediction`: how well each source predicts the "
        "text so far; or with the `weights` of `sources`, the default where one is given."
    ),
]


class SourceEntry(Section):
    """One of several sources. A name alone has weight 1."""

    source: Annotated[str, Field(description="Source checkpoint: directory or hub id.")]
    weight: Annotated[PositiveFloat, Field(description="Weight relative to those of the other sources.")] = 1.0

    @pydantic.model_validator(mode="before")
    @classmethod
    def _of_name(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


def source_key(number: int) -> str:
    """Returns the name of the source with this number, from 0."""
    return SOURCE if number == 0 else f"{SOURCE}-{number + 1}"


def by_key(sources: tuple[SourceEntry, ...]) -> dict[str, SourceEntry]:
    """Returns several sources by their names in stages, inputs and arms."""
    return {source_key(number): entry for number, entry in enumerate(sources)}


def with_mixing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns plain values with `mixing`: by `weights` where an entry of `sources` has one, else by `prediction`."""
    entries = values.get("sources")
    if values.get("mixing") is not None or not isinstance(entries, list | tuple):
        return dict(values)
    weighed = any(isinstance(entry, dict) and entry.get("weight") is not None for entry in entries)
    return {**values, "mixing": "weights" if weighed else "prediction"}


def first_as_source(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns plain values whose `source` is the first of `sources`, if there are any.

    Raises:
        InputError: `source` names another model than the first of `sources`.
    """
    entries = values.get("sources")
    if not isinstance(entries, list | tuple) or not entries:
        return dict(values)
    first = entries[0].get(SOURCE) if isinstance(entries[0], dict) else entries[0]
    if values.get(SOURCE) not in (None, first):
        raise InputError("recipe: source and sources are both given: leave one of them out")
    return {**values, SOURCE: first if isinstance(first, str) else "-"}


def require_different(values: Mapping[str, Any], sources: tuple[SourceEntry, ...]) -> None:
    """Raises InputError if a recipe gives both keys, or names a source twice.

    Args:
        values: Plain values of the recipe.
        sources: Its entries of `sources`.
    """
    if sources and values.get("source") is not None:
        raise InputError("recipe: source and sources are both given: leave one of them out")
    names = [entry.source for entry in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"recipe: sources has {twice} twice: give it once, with a larger weight")
