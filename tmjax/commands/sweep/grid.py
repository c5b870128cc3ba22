"""Axes of a sweep: keys, their values, and the settings that combine them."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import yaml

from tmjax.errors import InputError
from tmjax.recipes.base import ALL_ROLES, ATTENTION_ROLES
from tmjax.recipes.forward_dtype import with_dtype
from tmjax.recipes.merge import Recipe
from tmjax.transfer.operator import contributed_roles, operators_of
from tmjax.transfer.recipe import build_recipe

Value: TypeAlias = str | bool | int | float | None
#: One value per swept key.
Setting: TypeAlias = dict[str, Value]

#: Short names of recipe keys.
SHORT: Mapping[str, str] = {"beta": "coefficients.beta", "epsilon": "alignment.epsilon", "solver": "alignment.solver"}
#: Roles that `alpha.NAME` and `beta.NAME` set, the most specific last.
PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": ATTENTION_ROLES,
    "mlp": tuple(role for role in ALL_ROLES if role not in ATTENTION_ROLES),
    **{role: (role,) for role in ALL_ROLES},
}
#: Largest number of settings of one sweep.
MAX_SETTINGS = 100_000
#: Keys that all settings of a sweep share (inputs, evaluation), and keys that only other commands use.
FIXED = (
    *("source", "target", "texts", "valid", "test", "out", "preset", "controls", "allow_negligible", "mesh"),
    "screen_texts",
)
_CHOICE = tuple(f"coefficients.{key}" for key in ("fit", "alphas", "betas", "groups", "learning"))
FIXED_UNDER = ("evaluation", "export", *_CHOICE)

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_STEPS = re.compile(rf"({_NUMBER}):({_NUMBER}):({_NUMBER})")
_RANGE = re.compile(rf"(log:)?({_NUMBER})\.\.({_NUMBER})")


@dataclass(frozen=True)
class Range:
    """Values drawn between `low` and `high`, uniformly or (`log`) uniformly in their logarithm."""

    low: float
    high: float
    log: bool = False

    def draw(self, generator: np.random.Generator, *, whole: bool) -> float | int:
        """Draws one value; with `whole` an integer, both ends included."""
        if whole and not self.log:
            return int(generator.integers(math.ceil(self.low), math.floor(self.high), endpoint=True))
        if self.log:
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = generator.uniform(self.low, self.high)
        value = round(value) if whole else float(f"{value:.6g}")
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Axis:
    """One swept key: the values of a grid, or a range to draw from."""

    key: str
    values: tuple[Value, ...] = ()
    range: Range | None = None


def parse_axis(text: str) -> Axis:
    """Parses an axis: `key=a,b,c`, `key=lo:hi:step` (ends included; lists may hold such steps), `key=[log:]lo..hi`.

    Raises InputError for text of another form, for ranges without values and for values given twice.
    """
    key, equals, listing = text.partition("=")
    key, listing = key.strip(), listing.strip()
    if not (equals and key and listing):
        raise InputError(f"--grid {text!r}: write key=value,value or key=low:high:step")
    if match := _RANGE.fullmatch(listing):
        log, low, high = bool(match[1]), float(match[2]), float(match[3])
        if not low < high or (log and low <= 0) or not math.isfinite(high - low):
            raise InputError(f"--grid {text!r}: the range is empty" + ("; log: needs 0 < low < high" if log else ""))
        return Axis(key, range=Range(low, high, log))
    values: list[Value] = []
    for item in listing.split(","):
        values += _steps(match, text) if (match := _STEPS.fullmatch(item.strip())) else [_value(item, text)]
    if len({repr(value) for value in values}) < len(values):
        raise InputError(f"--grid {text!r}: a value is given twice")
    return Axis(key, tuple(values))


def _steps(match: re.Match[str], text: str) -> list[Value]:
    low, high, step = (float(part) for part in match.groups())
    # The tolerance includes the end: 0:0.3:0.1 ends at 0.3.
    steps = (high - low) / step + 1e-6 if step > 0 else -1.0
    if steps < 0:
        raise InputError(f"--grid {text!r}: {match[0]} holds no value; write low:high:step with step > 0")
    if steps > MAX_SETTINGS:
        raise InputError(f"--grid {text!r}: {match[0]} holds {steps:.0f} values; at most {MAX_SETTINGS} are allowed")
    whole = all(re.fullmatch(r"[+-]?\d+", part) for part in match.groups())
    values = [low + step * number for number in range(int(steps) + 1)]
    return [int(value) if whole else float(f"{value:.10g}") + 0.0 for value in values]


def _value(item: str, text: str) -> Value:
    item = item.strip()
    if re.fullmatch(_NUMBER, item):  # YAML would read 1e-3 as text
        return int(item) if re.fullmatch(r"[+-]?\d+", item) else float(item)
    value = yaml.safe_load(item) if re.fullmatch(r"[\w.+-]+", item) else item
    if item == "" or not isinstance(value, str | bool | type(None)):
        raise InputError(f"--grid {text!r}: {item!r} is not a value")
    return value


def is_part(key: str) -> bool:
    """Whether a key is a coefficient of some projections only, such as alpha.mlp."""
    name, dot, part = key.partition(".")
    return bool(dot) and name in ("alpha", "beta") and part in PARTS


def parse_axes(texts: Sequence[str], recipe: Recipe, *, random: bool) -> list[Axis]:
    """Parses all axes and checks each value against the recipe; raises InputError."""
    axes = [parse_axis(text) for text in texts]
    choosing = [step.operator.name for step in operators_of(recipe) if step.operator.chooses]
    keys = [SHORT.get(axis.key, axis.key) for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(f"--grid {key} is given twice")
    if not axes:
        raise InputError("nothing to sweep: give --grid key=value,value")
    for axis, key in zip(axes, keys, strict=True):
        if key in FIXED or any(key == name or key.startswith(f"{name}.") for name in (*FIXED_UNDER, *choosing)):
            raise InputError(f"--grid {axis.key}: every setting of a sweep shares it; it cannot be swept")
        if axis.range and not random:
            raise InputError(f"--grid {axis.key}: a range low..high is drawn from: give --random N, or low:high:step")
        ends = (axis.range.low, axis.range.high) if axis.range else ()
        if axis.range and _whole(recipe, axis):
            ends = (math.ceil(ends[0]), math.floor(ends[1]))
            if ends[0] > ends[1]:
                raise InputError(f"--grid {axis.key}: no whole number lies in the range")
        for value in axis.values or ends:
            try:
                recipe_of(recipe, {axis.key: value})
            except InputError as error:
                raise InputError(f"--grid {axis.key}={_shown(value)}: {error}") from None
    covered = {role for key in keys if key.startswith("alpha.") for role in PARTS[key.removeprefix("alpha.")]}
    needed = {
        role
        for step in operators_of(recipe)
        if step.contributes
        for role in contributed_roles(step, getattr(step.options, "roles", None) or ALL_ROLES)
    }
    if recipe.alpha is None and "alpha" not in keys and not covered >= needed:
        raise InputError(
            "a sweep does not choose alpha by itself: sweep it (--grid alpha=0:0.3:0.02) or give --alpha X"
        )
    return axes


def _shown(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _whole(recipe: Recipe, axis: Axis) -> bool:
    """Whether the recipe takes only whole numbers for a key: it refuses a number between two that it takes."""
    low = math.ceil(axis.range.low)

    def takes(value: float) -> bool:
        try:
            recipe_of(recipe, {axis.key: value})
        except InputError:
            return False
        return True

    return takes(low) and not takes(low + 0.5) and takes(low + 1)


def recipe_of(recipe: Recipe, setting: Mapping[str, Value]) -> Recipe:
    """Returns the recipe with a setting's values. Coefficients of parts (`is_part`) are checked and left out.

    Raises InputError for unknown keys and for values that the recipe refuses.
    """
    values = recipe.model_dump(mode="json")
    for name, value in setting.items():
        if is_part(name):
            if name.startswith("alpha") or value != "tied":
                _check_coefficient(name, value)
            continue
        *parents, last = SHORT.get(name, name).split(".")
        place = _section(values, parents)
        if not isinstance(place, dict) or (last not in place and parents != ["alignment", "solver_options"]):
            raise InputError(f"{name} is not a key of the recipe")
        place[last] = value
    return with_dtype(build_recipe(values))


def _section(values: dict[str, Any], parents: list[str]) -> Any:
    """Finds the section of a key: one of the recipe, or the options of an operator, named without its place."""
    if parents and parents[0] == "operators":
        parents = parents[1:]
    operators = {name: options for entry in values["operators"] for name, options in entry.items()}
    if parents and parents[0] in operators and parents[0] not in values:
        place: Any = operators[parents[0]]
        parents = parents[1:]
    else:
        place = values
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    return place


def _check_coefficient(name: str, value: Value) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (name.startswith("alpha") and not 0 <= value <= 1):
        raise InputError(f"{name} must be a number" + (" from 0 to 1" if name.startswith("alpha") else ""))


def make_settings(axes: Sequence[Axis], recipe: Recipe, *, random: int | None = None) -> list[Setting]:
    """Combines the axes' values, the last axis fastest, or makes `random` draws with the recipe's seed.

    Raises InputError for more than 100,000 settings.
    """
    count = math.prod(len(axis.values) for axis in axes) if random is None else random
    if count > MAX_SETTINGS:
        raise InputError(f"the sweep has {count} settings; at most {MAX_SETTINGS} are allowed")
    keys = [axis.key for axis in axes]
    if random is None:
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]
    whole = {axis.key: axis.range is not None and _whole(recipe, axis) for axis in axes}
    generator = np.random.default_rng(recipe.seed)
    return [
        {
            axis.key: axis.range.draw(generator, whole=whole[axis.key])
            if axis.range
            else axis.values[generator.integers(len(axis.values))]
            for axis in axes
        }
        for _ in range(random)
    ]


def coefficients_of(recipe: Recipe, setting: Mapping[str, Any], roles: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Returns (alpha, beta) of every role, its own before those of its kind and of all; a tied beta is -alpha."""
    beta_of_all = setting.get("beta", setting.get("coefficients.beta", recipe.coefficients.beta))
    result = {}
    for role in roles:
        alpha, beta = setting.get("alpha", recipe.alpha), beta_of_all
        for part, members in PARTS.items():
            if role in members:
                alpha = setting.get(f"alpha.{part}", alpha)
                beta = setting.get(f"beta.{part}", beta)
        result[role] = (float(alpha), -float(alpha) if isinstance(beta, str) else float(beta))
    return result
