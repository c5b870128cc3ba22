"""Flags that commands share, in groups, and the recipes that given flags make.

typer makes the flags of a command from the parameters of its function, one each. A command takes a group of flags as
one parameter, a frozen dataclass, of whose fields `with_flags` makes parameters.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from tmjax.errors import InputError

RecipeFile = Annotated[Path | None, typer.Argument(help="Recipe (YAML); flags win over it.", show_default=False)]
Source = Annotated[
    list[str] | None, typer.Option(help="Source checkpoint: directory or hub id; an adaptation takes several.")
]
Target = Annotated[str | None, typer.Option(help="Target checkpoint, whose architecture is kept.")]
TextFile = Annotated[
    str | None, typer.Option("--texts", help="Calibration texts: .jsonl, .txt or hf:NAME[:split[:field]].")
]
Valid = Annotated[str | None, typer.Option(help="Texts on which coefficients are chosen.")]
Test = Annotated[str | None, typer.Option(help="Texts on which the result is measured.")]
Others = Annotated[
    list[str] | None,
    typer.Option("--other-texts", help="Texts of another language or domain, scored before and after; repeatable."),
]
SameSize = Annotated[
    str | None, typer.Option(help="A model no larger than the target, merged as well where controls are run.")
]
Out = Annotated[str | None, typer.Option(help="Run directory.")]
Preset = Annotated[str | None, typer.Option(help="predictions (default), quick, barycentric or paper.")]
Alpha = Annotated[float | None, typer.Option(help="Fixes alpha and switches fitting off.")]
Controls = Annotated[bool | None, typer.Option("--controls/--no-controls", help="Run every control arm too.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Mesh = Annotated[
    str | None, typer.Option(help="Device mesh, for example data=2,fsdp=2,tensor=2; default: auto, over all devices.")
]
Distributed = Annotated[
    bool, typer.Option("--distributed", help="One process of a job (TPU pod, SLURM, ...); all run the same command.")
]
Coordinator = Annotated[
    str | None, typer.Option(help="HOST:PORT of process 0, where --distributed cannot find the job by itself.")
]
Processes = Annotated[int | None, typer.Option("--num-processes", min=1, help="Processes of the job.")]
Process = Annotated[int | None, typer.Option("--process-id", min=0, help="Number of this process, from 0.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Negligible = Annotated[
    bool | None, typer.Option("--allow-negligible", help="Warn instead of refusing when nothing came from the source.")
]
Publish = Annotated[
    str | None, typer.Option("--push-to-hub", help="OWNER/MODEL on the Hugging Face hub that gets the result.")
]
Public = Annotated[bool, typer.Option("--public", help="Let everybody see a new repository; it is private otherwise.")]
Draws = Annotated[int, typer.Option(min=1, help="Bootstrap draws.")]


@dataclass(frozen=True)
class PairFlags:
    """The two models of a merge, and the texts that both read."""

    recipe: RecipeFile = None
    source: Source = None
    target: Target = None
    texts: TextFile = None


@dataclass(frozen=True)
class TextFlags(PairFlags):
    """The same with the texts that nothing is fitted on."""

    valid: Valid = None
    test: Test = None


@dataclass(frozen=True)
class MergeFlags(TextFlags):
    """All flags that are keys of a merge's recipe, and the recipe file."""

    other_texts: Others = None
    same_size_source: SameSize = None
    out: Out = None
    preset: Preset = None
    alpha: Alpha = None
    controls: Controls = None
    seed: Seed = None
    mesh: Mesh = None
    allow_negligible: Negligible = None


@dataclass(frozen=True)
class JobFlags:
    """The job that a process is part of."""

    distributed: Distributed = False
    coordinator: Coordinator = None
    num_processes: Processes = None
    process_id: Process = None


@dataclass(frozen=True)
class OutputFlags:
    """The treatment of an existing output, and the form of what is printed."""

    overwrite: Overwrite = False
    as_json: Json = False


@dataclass(frozen=True)
class PublishFlags:
    """Publication of the result of a run."""

    push_to_hub: Publish = None
    public: Public = False


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Makes parameters of the fields of all groups that a command takes.

    Args:
        command: A function, some of whose parameters are dataclasses of flags.

    Returns:
        The command as typer reads it: with a parameter per flag, in the same order.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        flags = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(each.name, parameter.kind, default=each.default, annotation=flags[each.name])
            for each in fields(groups[name])
        ]

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in fields(group)})
        command(**given)

    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(flat)["__signature__"] = inspect.Signature(parameters)
    return flat


def values_of(
    file: Path | None, given: Mapping[str, Any], required: tuple[str, ...], *, between: str = ", "
) -> dict[str, Any]:
    """Reads the values of a recipe file and puts those given on the command line over them.

    Sources of the command line take the place of those of the file.

    Args:
        file: The recipe file, if there is one.
        given: Values by key; None: not given.
        required: Keys without which there is no recipe.
        between: Text between the names of missing keys in the error.

    Returns:
        The values by key.

    Raises:
        InputError: The file cannot be read, or a required key is missing.
    """
    from tmjax.recipes.base import read_recipe

    values = read_recipe(file) if file else {}
    given = _with_sources(given)
    if given.keys() & _SOURCES:
        values = {name: value for name, value in values.items() if name not in _SOURCES}
    values |= {name: value for name, value in given.items() if value is not None}
    missing = [name for name in required if name not in values and not (name == "source" and "sources" in values)]
    if missing:
        raise InputError(f"give {between.join('--' + name for name in missing)} or name them in a recipe")
    return values


def _with_sources(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns given values with one `--source` as `source`, and several as `sources`."""
    named = given.get("source")
    others = {name: value for name, value in given.items() if name != "source"}
    if not named:
        return others
    return others | ({"source": named[0]} if len(named) == 1 else {"sources": list(named)})


def folder_of(file: Path | None) -> Path | None:
    """Returns the folder of a recipe file, to which its paths may be relative."""
    return file.parent if file else None


def names_of(text: str | None) -> list[str]:
    """Returns the names of a list with commas, each once."""
    return list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))


#: Keys of one source, and of several.
_SOURCES = {"source", "sources"}
#: Flags that are keys of a merge's recipe.
_MERGE_KEYS = frozenset(each.name for each in fields(MergeFlags)) - {"recipe"}


def recipe_of(flags: PairFlags) -> Any:
    """Builds the recipe of a merge from a recipe file and the flags that win over it.

    Raises:
        InputError: A key is missing or wrong.
    """
    from tmjax.transfer.recipe import build_recipe

    given = {name: value for name, value in vars(flags).items() if name in _MERGE_KEYS}
    values = values_of(flags.recipe, given, ("source", "target", "texts", "out"))
    return build_recipe(values, base=folder_of(flags.recipe))


def pair_of(flags: PairFlags, mesh: str | None) -> tuple[Any, bool]:
    """Builds a recipe of which only the two models must be known.

    Returns:
        The recipe, and whether it names texts.

    Raises:
        InputError: A key is missing or wrong.
    """
    from tmjax.transfer.recipe import build_recipe

    given = {"source": flags.source, "target": flags.target, "texts": flags.texts, "mesh": mesh}
    values = values_of(flags.recipe, given, ("source", "target"), between=" and ")
    recipe = build_recipe({"texts": "-", "out": "-"} | values, base=folder_of(flags.recipe))
    return recipe, "texts" in values
