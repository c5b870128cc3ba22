"""`tmjax adapt`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tmjax.cli.application import join_job
from tmjax.cli.options import (
    Controls,
    JobFlags,
    Mesh,
    Others,
    Out,
    OutputFlags,
    PublishFlags,
    RecipeFile,
    Seed,
    Source,
    Test,
    folder_of,
    values_of,
)
from tmjax.cli.terminal import progress_display, show_run
from tmjax.cli.verbs.result_commands import publication
from tmjax.errors import InputError


@dataclass(frozen=True)
class AdaptFlags:
    """Keys of an adaptation's recipe, and the recipe file."""

    recipe: RecipeFile = None
    source: Source = None
    mixing: Annotated[
        str | None,
        typer.Option(
            help="Of several sources: prediction of the text so far, or weights (the default if the recipe has them)."
        ),
    ] = None
    target: Annotated[str | None, typer.Option(help="Target checkpoint, or a run of tmjax merge.")] = None
    texts: Annotated[
        str | None, typer.Option("--texts", help="Training texts: text, prompt and response, or messages.")
    ] = None
    valid: Annotated[str | None, typer.Option(help="Texts on which steps and learning rate are chosen.")] = None
    test: Test = None
    other_texts: Others = None
    out: Out = None
    mode: Annotated[
        str | None,
        typer.Option(help="combined (the default), guided, distilled, source-written, residual-frozen, lora or sft."),
    ] = None
    init: Annotated[str | None, typer.Option(help="Where training begins: target or merged.")] = None
    alpha: Annotated[float | None, typer.Option(help="Coefficient of what is transported; default: the merge's.")] = (
        None
    )
    steps: Annotated[str | None, typer.Option(help="Updates of every arm; several by commas.")] = None
    lr: Annotated[str | None, typer.Option(help="Learning rate, or several: 3e-4,1e-3; validation text chooses.")] = (
        None
    )
    budget: Annotated[
        str | None,
        typer.Option(help="Time for the adapted model (90s, 30m, 2h): it decides all settings."),
    ] = None
    tokens: Annotated[int | None, typer.Option(help="The same in training tokens instead of time.")] = None
    controls: Controls = None
    seed: Seed = None
    mesh: Mesh = None


def adapt(flags: AdaptFlags, publishing: PublishFlags, job: JobFlags, output: OutputFlags) -> None:
    """Train a target on texts, guided by a source or on top of a merge, beside controls of the same budget."""
    from tmjax.recipes.adapt import build_adapt_recipe

    if (flags.budget or flags.tokens) and (flags.lr or flags.steps):
        raise InputError("--budget and --tokens choose steps and learning rate: leave --lr and --steps out")
    given = {name: value for name, value in vars(flags).items() if name not in ("recipe", "lr", "steps")}
    values = values_of(flags.recipe, given, ("target", "texts", "out"))
    listed = {
        name: [part.strip() for part in value.split(",")]
        for name, value in (("lr", flags.lr), ("steps", flags.steps))
        if value
    }
    training = dict(values.get("training") or {}) | listed
    settings = build_adapt_recipe(values | {"training": training}, base=folder_of(flags.recipe))
    with join_job(job):
        from tmjax.commands.adapt.run import Adapt
        from tmjax.report.training_page import adapt_summary

        publish = publication(publishing)
        with progress_display() as (progress, warn):
            manifest = Adapt(settings, overwrite=output.overwrite, show=progress, warn=warn).all()
        published = publish(Path(settings.out))
    show_run(settings.out, manifest, adapt_summary, published, as_json=output.as_json)
