"""`tmjax run`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tmjax.cli.application import join_job
from tmjax.cli.options import (
    JobFlags,
    Mesh,
    Others,
    Out,
    OutputFlags,
    PublishFlags,
    Seed,
    Source,
    Test,
    folder_of,
    values_of,
)
from tmjax.cli.terminal import directory_line, progress_display, show_published, show_result
from tmjax.cli.verbs.result_commands import publication
from tmjax.errors import InputError


@dataclass(frozen=True)
class StepFlags:
    """The recipe of several steps, and its keys that steps share."""

    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML) with steps; flags win over it.", show_default=False)]
    source: Source = None
    target: Annotated[str | None, typer.Option(help="Target of the first step.")] = None
    texts: Annotated[str | None, typer.Option("--texts", help="Texts of all steps: .jsonl, .txt or hf:NAME.")] = None
    valid: Annotated[str | None, typer.Option(help="Texts on which choices are made.")] = None
    test: Test = None
    other_texts: Others = None
    out: Out = None
    seed: Seed = None
    mesh: Mesh = None


def run(flags: StepFlags, publishing: PublishFlags, job: JobFlags, output: OutputFlags) -> None:
    """Run the steps of a recipe, in order: vocabulary, merge, adapt, convert, evaluate; one directory, one report.

    Finished steps are not repeated. With --overwrite a changed step is repeated, and the steps after it.
    """
    from tmjax.recipes.steps_recipe import build_steps_recipe, has_steps

    given = {name: value for name, value in vars(flags).items() if name != "recipe"}
    values = values_of(flags.recipe, given, ("out",))
    if not has_steps(values):
        raise InputError(f"recipe {flags.recipe} has no steps; tmjax merge or tmjax adapt runs it")
    base = folder_of(flags.recipe)
    settings = build_steps_recipe(values, base=base)
    with join_job(job):
        from tmjax.commands.steps.run import Steps
        from tmjax.report.steps_page import steps_summary

        if publishing.push_to_hub is not None and not any({"merge", "adapt"} & step.keys() for step in settings.steps):
            raise InputError("--push-to-hub publishes the result of the last merge or adaptation, and no step is one")
        publish = publication(publishing)
        with progress_display() as (progress, warn):
            steps = Steps(settings, base=base, overwrite=output.overwrite, progress=progress, warn=warn)
            manifest = steps.all()
        result = steps.result_run()
        published = None if result is None else publish(result)

    def show(console: Any) -> None:
        console.print(steps_summary(manifest))
        console.print(directory_line(settings.out, *manifest["steps"], "report.html"))
        if published is not None:
            show_published(console, published)

    done = manifest if published is None else manifest | {"published": asdict(published)}
    show_result(done, show, as_json=output.as_json)
