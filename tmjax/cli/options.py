"""Options that commands share, and the recipes that given options make.

typer makes the flags of a command from the parameters of its function, one each: these functions alone have more
parameters than others.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from tmjax.errors import InputError

RecipeFile = Annotated[Path | None, typer.Argument(help="Recipe (YAML); flags win over it.", show_default=False)]
Source = Annotated[str | None, typer.Option(help="Source checkpoint: directory or hub id.")]
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

#: Options of `tmjax merge` that are keys of its recipe.
MERGE_KEYS = (
    "source",
    "target",
    "texts",
    "valid",
    "test",
    "other_texts",
    "same_size_source",
    "out",
    "preset",
    "alpha",
    "controls",
    "seed",
    "mesh",
    "allow_negligible",
)


def given_options(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the options that were given on the command line, of those named."""
    return {name: options[name] for name in names if options.get(name) is not None}


def recipe_of(file: Path | None, options: dict[str, Any]) -> Any:
    """Builds the recipe of a merge from a recipe file and the options that win over it.

    Raises:
        InputError: A key is missing or wrong.
    """
    from tmjax.recipes.base import read_recipe
    from tmjax.transfer.recipe import build_recipe

    values = read_recipe(file) if file else {}
    given = given_options(options, MERGE_KEYS)
    missing = [name for name in ("source", "target", "texts", "out") if name not in values | given]
    if missing:
        raise InputError(f"give {', '.join('--' + name for name in missing)} or name them in a recipe")
    return build_recipe(values | given, base=file.parent if file else None)


def pair_of(file: Path | None, options: dict[str, Any]) -> tuple[Any, bool]:
    """Builds a recipe of which only the two models must be known.

    Returns:
        The recipe, and whether it names texts.

    Raises:
        InputError: A key is missing or wrong.
    """
    from tmjax.recipes.base import read_recipe
    from tmjax.transfer.recipe import build_recipe

    values = (read_recipe(file) if file else {}) | given_options(options, ("source", "target", "texts", "mesh"))
    missing = [name for name in ("source", "target") if name not in values]
    if missing:
        raise InputError(f"give {' and '.join('--' + name for name in missing)} or name them in a recipe")
    recipe = build_recipe({"texts": "-", "out": "-"} | values, base=file.parent if file else None)
    return recipe, "texts" in values
