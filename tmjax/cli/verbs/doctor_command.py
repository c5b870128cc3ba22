"""`tmjax doctor`, and `tmjax plan`, which asks compilers: checks before a run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tmjax.cli.options import Json, Mesh, PairFlags, Preset, folder_of, pair_of, values_of
from tmjax.cli.terminal import progress_display, show_result
from tmjax.errors import InputError, summarise


def doctor(flags: PairFlags, mesh: Mesh = None, as_json: Json = False) -> None:
    """Before any weight is read: can these two be merged, what is mapped, what memory and time will it take."""
    from tmjax.commands.doctor.examine import examine
    from tmjax.commands.doctor.summary import doctor_summary

    settings, has_texts = pair_of(flags, mesh)
    report = examine(settings, texts=has_texts)
    show_result(report, lambda console: console.print(doctor_summary(report), highlight=False), as_json=as_json)
    if not report["mergeable"]:
        raise InputError(f"{settings.source} cannot be merged into {settings.target}: {summarise(report['problems'])}")


def plan(
    topology: Annotated[
        str,
        typer.Option(help="Machine to compile for: v5e-16, v5p-8, v6e-16, v4-32, h100:8, ..."),
    ],
    flags: PairFlags,
    preset: Preset = None,
    mesh: Mesh = None,
    text_count: Annotated[int | None, typer.Option(min=1, help="Texts to assume; default: as in the file.")] = None,
    text_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of a text to assume.")] = None,
    stages: Annotated[str | None, typer.Option(help="Stages, or STAGE PROGRAM, by commas; default: all.")] = None,
    as_json: Json = False,
) -> None:
    """Compile every program of a recipe for a machine that need not be there: what fits, what it costs, how long."""
    from tmjax.commands.plan.machines import parse_topology
    from tmjax.commands.plan.plan_table import plan_summary
    from tmjax.commands.plan.planning import Question, plan, workload_of

    where = parse_topology(topology)
    recipe = _recipe_of(flags, preset)
    only = tuple(part.strip() for part in (stages or "").split(",") if part.strip())
    question = Question(recipe, where, workload_of(recipe, text_count, text_tokens), mesh, only)
    with progress_display() as (progress, _):
        report = plan(question, progress)
    show_result(report, lambda console: console.print(plan_summary(report), highlight=False), as_json=as_json)
    bad = [f"{row['stage']} {row['program']}" for row in report["programs"] if not row["fits"]]
    if bad:
        raise InputError(f"{len(bad)} of {len(report['programs'])} programs do not compile or fit: {', '.join(bad)}")


def _recipe_of(flags: PairFlags, preset: str | None) -> Any:
    """Builds the recipe: of an adaptation if the file has keys that only such a recipe has, else of a merge."""
    from tmjax.recipes.adapt import build_adapt_recipe, is_adaptation
    from tmjax.recipes.base import read_recipe
    from tmjax.transfer.recipe import build_recipe

    file: Path | None = flags.recipe
    given = {"source": flags.source, "target": flags.target, "texts": flags.texts}
    if file is not None and is_adaptation(read_recipe(file)):
        values = values_of(file, given, ("target",))
        return build_adapt_recipe({"texts": "-", "out": "-"} | values, base=folder_of(file))
    if preset is None:
        return pair_of(flags, None)[0]
    values = values_of(file, given | {"preset": preset}, ("source", "target"), between=" and ")
    return build_recipe({"texts": "-", "out": "-"} | values, base=folder_of(file))
