"""Common parts of all recipes: frozen sections, places of inputs, validation of plain values, YAML files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from tmjax.errors import InputError, summarise
from tmjax.plugins import beside

Alpha = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
ALL_ROLES: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION_ROLES: tuple[Role, ...] = ("q", "k", "v", "o")
#: Largest ratio of a generated text to the given ones in bits per byte under the target; beyond, it is left out.
FOREIGN = 1.5


class Section(BaseModel):
    """A frozen part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class Placed(Section):
    """A recipe that names inputs; `places` maps local ones to their absolute paths at the time it was stored."""

    if TYPE_CHECKING:
        out: str
        valid: str | None
        test: str | None
        other_texts: tuple[str, ...]
        places: dict[str, str]

    def inputs(self) -> dict[str, str]:
        """Returns the names of all inputs, by their keys."""
        names: dict[str, str | None] = {key: getattr(self, key, None) for key in _PATHS}
        names |= self.bases()
        names |= {f"other_texts.{number}": name for number, name in enumerate(getattr(self, "other_texts", ()))}
        return {key: name for key, name in names.items() if name is not None}

    def bases(self) -> dict[str, str]:
        """Returns further checkpoints that settings name, by their keys."""
        return {}

    def place(self, name: str) -> str:
        """Returns the path of a named input: its stored place if that exists, otherwise the name itself.

        A relative name is resolved against the working directory, then against the folders above the run, which may
        have been moved together with its inputs.
        """
        given, stored = Path(name).expanduser(), self.places.get(name)
        if stored is None or (given.exists() and (not Path(stored).exists() or given.samefile(stored))):
            return name
        if Path(stored).exists() or given.is_absolute():
            return stored
        above = (folder / name for folder in Path(self.out).absolute().parents)
        return next((str(place) for place in above if place.exists()), name)

    def moved(self) -> list[str]:
        """Returns a line for every input that is no longer at its stored place; raises InputError for a missing one."""
        lines = []
        for key, name in self.inputs().items():
            stored, place = self.places.get(name), self.place(name)
            if stored is None or Path(stored).exists():
                continue
            if not Path(place).expanduser().exists():
                raise InputError(f"{key} {name} is neither here nor where it was ({stored}); put it back to either")
            lines.append(f"{key} {name} is no longer at {stored}: {Path(place).absolute()} is taken")
        return lines

    def placed(self: "P") -> "P":
        """Returns the recipe with the present places of its local inputs."""
        now = {name: Path(self.place(name)).expanduser() for name in self.inputs().values()}
        return self.model_copy(update={"places": {n: os.path.abspath(p) for n, p in now.items() if p.exists()}})


_PATHS = ("source", "target", "texts", "valid", "test", "same_size_source")
#: Further inputs of single steps.
_STEP_PATHS = ("tokenizer", "base", "tasks_dir")
R = TypeVar("R", bound=Section)
P = TypeVar("P", bound=Placed)


class EvaluationOptions(Section):
    """Computation of bits per byte and their intervals."""

    draws: Annotated[Positive, Field(description="Bootstrap draws of an interval.")] = 10000
    batch_tokens: Annotated[Positive, Field(description="Tokens per batch of a forward pass.")] = 4096
    max_tokens: Annotated[
        Positive | None,
        Field(description="Longest window of tokens, into which documents are cut; the model's context unless given."),
    ] = None


class ExportOptions(Section):
    """Writing of the resulting checkpoint."""

    max_shard_size: Annotated[
        str, Field(description="Largest file of weights; a larger checkpoint is written as several.")
    ] = "5GB"
    lora: Annotated[
        Positive | None,
        Field(
            description="Rank of a LoRA of the result's change, which is written into `lora/` as a PEFT adapter beside "
            "the checkpoint; none unless given."
        ),
    ] = None


#: Settings of the export that change no checkpoint: a finished run goes on with others.
BESIDE_CHECKPOINT = {"export": {"lora": True}}


def checked(kind: type[R], values: dict[str, Any], renamed: Mapping[str, str] | None = None, *, place: str = "") -> R:
    """Builds a recipe of a kind from plain values.

    Args:
        kind: The class of the recipe.
        values: Its values, nested as in a recipe file.
        renamed: Former keys (dotted) and their present names, for the error.
        place: Key under which the section stands in its recipe, for the error.

    Returns:
        The recipe.

    Raises:
        InputError: Values are wrong or keys unknown; all faults are listed.
    """
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        lead = (place,) if place else ()
        keys = [(".".join(map(str, (*lead, *fault["loc"]))), fault) for fault in error.errors()]
        faults = [f"{key}: {_plain(fault, (renamed or {}).get(key))}" for key, fault in keys]
        raise InputError(f"recipe: {summarise(faults)}") from None


class _TwiceError(Exception):
    """A duplicate key of a mapping, with its lines."""


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys; PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """Constructs the mapping of a node; raises for a duplicate key."""
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            name, line = self.construct_object(key), key.start_mark.line + 1
            if name in lines:
                raise _TwiceError(f"{name} twice (lines {lines[name]} and {line})")
            lines[name] = line
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads the mapping of a YAML recipe file over those of the files that it includes, without validation.

    Files of `include` are relative to the file that names them. Later files win over earlier ones, and the file's own
    keys over all: mappings are merged, everything else is replaced. Keys that begin with `x-` are places for YAML
    anchors and are dropped. Relative paths of inputs in an included file are taken from its folder, if they exist only
    there.

    Args:
        path: The file.

    Returns:
        Its values.

    Raises:
        InputError: A file cannot be read, has a key twice, or includes itself; names the file or the cycle.
    """
    return _included(path, ())


def _included(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Reads a file that the files `above` include, the recipe first."""
    if any(path.resolve() == file.resolve() for file in above):
        raise InputError(f"recipes include each other: {' -> '.join(map(str, (*above, path)))}")
    values = {key: value for key, value in _mapping(path).items() if not str(key).startswith("x-")}
    names = values.pop("include", None) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"recipe {path}: include is a list of files")
    shared: dict[str, Any] = {}
    for name in names:
        file = path.parent / Path(name).expanduser()
        shared = merged_values(shared, _placed_near(_included(file, (*above, path)), file.parent))
    return merged_values(shared, values)


def _placed_near(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns values with relative paths of inputs, operators and a solver that exist in a folder alone from there."""

    def near(value: Any) -> Any:
        if not isinstance(value, str) or Path(value).exists() or not (folder / value).exists():
            return value
        return str(folder / value)

    def operator(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {beside(str(name), folder): options for name, options in entry.items()}
        return beside(entry, folder) if isinstance(entry, str) else entry

    def step(entry: Any) -> Any:
        nested = entry.items() if isinstance(entry, dict) else ()
        own = {kind: _placed_near(settings, folder) for kind, settings in nested if isinstance(settings, dict)}
        return entry | own if own else entry

    def source(entry: Any) -> Any:
        return entry | {"source": near(entry.get("source"))} if isinstance(entry, dict) else near(entry)

    placed = values | {key: near(values[key]) for key in (*_PATHS, *_STEP_PATHS) if key in values}
    for key, place in (("other_texts", near), ("operators", operator), ("sources", source)):
        if isinstance(values.get(key), list):
            placed[key] = [place(each) for each in values[key]]
    alignment = values.get("alignment")
    if isinstance(alignment, dict) and isinstance(alignment.get("solver"), str):
        placed["alignment"] = alignment | {"solver": beside(alignment["solver"], folder)}
    if isinstance(values.get("steps"), list):
        placed["steps"] = [step(each) for each in values["steps"]]
    return placed


def _mapping(path: Path) -> dict[str, Any]:
    """Reads the mapping of one file."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    except _TwiceError as error:
        raise InputError(f"recipe {path} has the key {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"recipe {path} does not hold a mapping")
    return values


def merged_values(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Returns nested values over defaults: mappings are merged, everything else is replaced."""
    result = dict(defaults)
    for key, value in values.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged_values(result[key], value) if nested else value
    return result


def dump_recipe(recipe: Section, *, places: bool = True) -> str:
    """Returns the recipe as YAML with every default; without `places` the paths of local inputs are left out."""
    values = recipe.model_dump(mode="json")
    if not (places and values.get("places")):
        values.pop("places", None)
    return dump_values(values)


def dump_values(values: Mapping[str, Any]) -> str:
    """Returns the plain values of a recipe as YAML."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _plain(fault: Any, renamed: str | None) -> str:
    if fault["type"] != "extra_forbidden":
        return fault["msg"]
    return "unknown key" if renamed is None else f"this key is called {renamed} now"


def found_near(recipe: P, base: Path) -> P:
    """Returns the recipe with relative paths resolved against `base` where a file exists only there."""

    def near(name: str | None) -> str | None:
        if name is None or Path(recipe.place(name)).exists():
            return name
        return str(base / name) if (base / name).exists() else name

    paths: dict[str, Any] = {key: near(getattr(recipe, key)) for key in _PATHS if hasattr(recipe, key)}
    paths["other_texts"] = tuple(near(name) for name in getattr(recipe, "other_texts", ()))
    if hasattr(recipe, "sources"):
        paths["sources"] = tuple(each.model_copy(update={"source": near(each.source)}) for each in recipe.sources)
    return recipe.model_copy(update=paths)
