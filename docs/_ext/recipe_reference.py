"""The reference of recipes, made of the settings' own types, defaults and descriptions."""

import inspect
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

import yaml
from markdown_table import table
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_SIGNS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def type_text(annotation: Any) -> str:
    """Describes a type as a reader of YAML needs it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        limits = _limits(arguments[1:])
        return type_text(arguments[0]) + (f" {limits}" if limits else "")
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value) if isinstance(value, bool) else value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if each is type(None) else type_text(each) for each in arguments)
    if origin in (tuple, list):
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return "mapping"
    names = {str: "text", bool: "true or false", int: "integer", float: "number", Any: "any"}
    return names.get(annotation, "section" if _is_section(annotation) else getattr(annotation, "__name__", ""))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _limits(metadata: tuple[Any, ...]) -> str:
    flat = [part for each in metadata for part in (each.metadata if isinstance(each, FieldInfo) else (each,))]
    return " and ".join(
        f"{sign} {getattr(part, name):g}"
        for part in flat
        for name, sign in _SIGNS.items()
        if getattr(part, name, None) is not None
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel) or value in ({}, ()):
        return ""
    if isinstance(value, tuple):
        value = list(value)
    return f"`{json.dumps(value)}`"


def settings(kind: type[BaseModel], place: str, level: int, defaults: Mapping[str, str] = {}) -> str:
    """Returns a heading, the text and the table of a section's settings, and then those of the sections inside it.

    Args:
        kind: The section.
        place: Its key in a recipe; empty for a whole recipe.
        level: Level of headings.
        defaults: Defaults that the types do not have, by key.
    """
    rows, inner = [], []
    for name, field in kind.model_fields.items():
        limits = _limits(tuple(field.metadata))
        kinds = type_text(field.annotation) + (f", {limits}" if limits else "")
        rows.append((f"`{name}`", kinds, defaults.get(name, _default(field)), field.description or ""))
        if _is_section(field.annotation):
            inner.append((name, field.annotation))
    title = f"{'#' * level} `{place}`\n\n" if place else ""
    text = f"{title}{inspect.getdoc(kind) or ''}\n\n" + table(("key", "value", "default", "meaning"), rows)
    return text + "".join(settings(each, f"{place}.{name}" if place else name, level) for name, each in inner)


def merge_recipe() -> str:
    """Returns the settings of a merge."""
    from tmjax.recipes.merge import Recipe
    from tmjax.recipes.presets import DEFAULT_PRESET

    return settings(Recipe, "", 3, {"preset": f"`{DEFAULT_PRESET}`", "operators": "the preset's"})


def adapt_recipe() -> str:
    """Returns the settings of an adaptation."""
    from tmjax.recipes.adapt import AdaptRecipe

    return settings(AdaptRecipe, "", 3)


def steps_recipe() -> str:
    """Returns the settings of a recipe of several steps, and of the steps that have no recipe of their own."""
    from tmjax.recipes.steps_recipe import PLAIN_STEPS, StepsRecipe

    target = {"target": "the model of the step before"}
    parts = [settings(kind, f"steps: {name}", 3, target) for name, kind in PLAIN_STEPS.items()]
    return "".join([settings(StepsRecipe, "", 3), *parts])


def operators() -> str:
    """Returns every built-in operator: its first sentence, its needs, and its options."""
    from tmjax.transfer.operator import builtin_operators

    parts = []
    for name, operator in sorted(builtin_operators().items()):
        kind = type(operator)
        needs = ", ".join(f"`{need}`" for need in sorted(operator.needs)) or "nothing"
        chooses = "It chooses on validation texts" if operator.chooses else "It chooses nothing by itself"
        parts.append(f"### `{name}`\n\n{inspect.getdoc(kind) or ''}\n\nNeeds {needs}. {chooses}.\n\n")
        parts.append(settings(operator.options, "", 4))
    return "".join(parts)


def presets() -> str:
    """Returns every preset as the recipe lines that it stands for."""
    from tmjax.recipes.presets import DEFAULT_PRESET, PRESETS

    parts = []
    for name, values in PRESETS.items():
        lines = yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
        parts.append(f"`{name}`{' (default)' if name == DEFAULT_PRESET else ''}:\n\n```yaml\n{lines}```\n\n")
    return "".join(parts)


def solvers() -> str:
    """Returns every solver with its options and their defaults."""
    from tmjax.ot import SOLVERS, solver_options

    rows = []
    for name, kind in SOLVERS.items():
        options = ", ".join(
            f"`{key}={value}`" if isinstance(value, str | int | float) or value is None else f"`{key}`"
            for key, value in solver_options(name).items()
        )
        first = (inspect.getdoc(kind) or "").split("\n\n")[0]
        rows.append((f"`{name}`", first, options))
    return table(("solver", "method", "options"), rows)
