"""`tmjax merge`, `tmjax align` and `tmjax fuse`: all stages of a merge, or some of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tmjax.cli.application import join_job
from tmjax.cli.options import (
    Alpha,
    Controls,
    Coordinator,
    Distributed,
    Json,
    Mesh,
    Negligible,
    Others,
    Out,
    Overwrite,
    Preset,
    Process,
    Processes,
    RecipeFile,
    SameSize,
    Seed,
    Source,
    Target,
    Test,
    TextFile,
    Valid,
    given_options,
    recipe_of,
)
from tmjax.cli.terminal import progress_display, show_run
from tmjax.errors import InputError


def _stages(*, everything: bool) -> Callable[..., None]:
    """Makes the command that runs all stages, or only those up to the alignment: both take the same flags."""

    def command(
        recipe: RecipeFile = None,
        source: Source = None,
        target: Target = None,
        texts: TextFile = None,
        valid: Valid = None,
        test: Test = None,
        other_texts: Others = None,
        same_size_source: SameSize = None,
        out: Out = None,
        preset: Preset = None,
        alpha: Alpha = None,
        controls: Controls = None,
        seed: Seed = None,
        mesh: Mesh = None,
        allow_negligible: Negligible = None,
        distributed: Distributed = False,
        coordinator: Coordinator = None,
        num_processes: Processes = None,
        process_id: Process = None,
        overwrite: Overwrite = False,
        as_json: Json = False,
    ) -> None:
        settings = recipe_of(recipe, locals())
        with join_job(locals()), progress_display() as (progress, warn):
            from tmjax.commands.merge.run import Merge

            merge = Merge(settings, overwrite=overwrite, progress=progress, warn=warn)
            if everything:
                merge.all()
            else:
                merge.align()
            manifest = merge.run.manifest.to_json()
        show_run(settings.out, manifest, as_json)

    return command


#: Without docstrings of their own: the two share one function.
merge, align = _stages(everything=True), _stages(everything=False)


def fuse(
    run: Annotated[Path, typer.Argument(help="Run directory of `tmjax align` or `tmjax merge`.")],
    alpha: Alpha = None,
    controls: Controls = None,
    valid: Valid = None,
    test: Test = None,
    other_texts: Others = None,
    mesh: Mesh = None,
    allow_negligible: Negligible = None,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    num_processes: Processes = None,
    process_id: Process = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fuse, evaluate and report from an existing alignment, perhaps with another alpha."""
    from tmjax.commands.merge.run import Merge, open_run

    changes = given_options(locals(), ("alpha", "controls", "valid", "test", "other_texts", "allow_negligible"))
    settings = open_run(run, changes | given_options(locals(), ("mesh",)))
    if changes and (run / "merged").exists() and not overwrite:
        raise InputError(f"{run} already holds a merge; pass --overwrite to fuse it again with other settings")
    with join_job(locals()), progress_display() as (progress, warn):
        manifest = Merge(settings, amend=True, progress=progress, warn=warn).all()
    show_run(settings.out, manifest, as_json)
