"""`tmjax adapt`."""

from typing import Annotated

import typer

from tmjax.cli.application import join_job
from tmjax.cli.options import (
    Controls,
    Coordinator,
    Distributed,
    Json,
    Mesh,
    Others,
    Out,
    Overwrite,
    Process,
    Processes,
    RecipeFile,
    Seed,
    Source,
    Test,
    given_options,
)
from tmjax.cli.terminal import open_console, print_json, progress_display
from tmjax.errors import InputError
from tmjax.sharding import job


def adapt(
    recipe: RecipeFile = None,
    source: Source = None,
    target: Annotated[str | None, typer.Option(help="Target checkpoint, or a run of tmjax merge.")] = None,
    texts: Annotated[
        str | None, typer.Option("--texts", help="Training texts: text, prompt and response, or messages.")
    ] = None,
    valid: Annotated[str | None, typer.Option(help="Texts on which steps and learning rate are chosen.")] = None,
    test: Test = None,
    other_texts: Others = None,
    out: Out = None,
    mode: Annotated[
        str | None, typer.Option(help="guided, distilled, source-written, combined, residual-frozen, lora or sft.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Where training begins: target or merged.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Coefficient of what is transported; default: the merge's.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Updates of every arm; several by commas.")] = None,
    lr: Annotated[
        str | None, typer.Option(help="Learning rate, or several: 3e-4,1e-3; validation text chooses.")
    ] = None,
    controls: Controls = None,
    seed: Seed = None,
    mesh: Mesh = None,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    num_processes: Processes = None,
    process_id: Process = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a target on texts, guided by a source or on top of a merge, beside controls of the same budget."""
    from tmjax.recipes.adapt import build_adapt_recipe
    from tmjax.recipes.base import read_recipe

    options = locals()
    values = read_recipe(recipe) if recipe else {}
    given = given_options(options, ("source", "target", "texts", "valid", "test", "out", "mode", "init", "alpha"))
    given |= given_options(options, ("controls", "seed", "mesh", "other_texts"))
    missing = [name for name in ("target", "texts", "out") if name not in values | given]
    if missing:
        raise InputError(f"give {', '.join('--' + name for name in missing)} or name them in a recipe")
    listed = {
        name: [part.strip() for part in value.split(",")] for name, value in (("lr", lr), ("steps", steps)) if value
    }
    training = dict(values.get("training") or {}) | listed
    settings = build_adapt_recipe(values | given | {"training": training}, base=recipe.parent if recipe else None)
    with join_job(options), progress_display() as (progress, warn):
        from tmjax.commands.adapt.run import Adapt

        manifest = Adapt(settings, overwrite=overwrite, show=progress, warn=warn).all()
    if as_json or job.silent():
        print_json(manifest)
        return
    from tmjax.report.training_page import adapt_summary

    open_console().print(adapt_summary(manifest))
    open_console().print(f"Run directory {settings.out} (with merged, report.html, plots)")
