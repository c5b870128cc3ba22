"""`tmjax merge`, `tmjax align` and `tmjax fuse`: all stages of a merge, or some of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tmjax.cli.application import join_job
from tmjax.cli.options import (
    Alpha,
    Controls,
    JobFlags,
    MergeFlags,
    Mesh,
    Negligible,
    Others,
    OutputFlags,
    Test,
    Valid,
    recipe_of,
)
from tmjax.cli.terminal import progress_display, show_run
from tmjax.errors import InputError


def _run(flags: MergeFlags, job: JobFlags, output: OutputFlags, stages: Callable[[Any], object]) -> None:
    """Runs stages of the merge that flags describe, and prints its result."""
    settings = recipe_of(flags)
    with join_job(job), progress_display() as (progress, warn):
        from tmjax.commands.merge.run import Merge

        merge = Merge(settings, overwrite=output.overwrite, progress=progress, warn=warn)
        stages(merge)
        manifest = merge.run.manifest.to_json()
    show_run(settings.out, manifest, output.as_json)


def merge(flags: MergeFlags, job: JobFlags, output: OutputFlags) -> None:
    """Merge a source model into a target model: all stages, controls, evaluation, report."""
    _run(flags, job, output, lambda merge: merge.all())


def align(flags: MergeFlags, job: JobFlags, output: OutputFlags) -> None:
    """Only activations and alignment; `tmjax fuse RUN` goes on from there."""
    _run(flags, job, output, lambda merge: merge.align())


@dataclass(frozen=True)
class FuseFlags:
    """Settings with which an aligned run may be fused again."""

    alpha: Alpha = None
    controls: Controls = None
    valid: Valid = None
    test: Test = None
    other_texts: Others = None
    mesh: Mesh = None
    allow_negligible: Negligible = None


def fuse(
    run: Annotated[Path, typer.Argument(help="Run directory of `tmjax align` or `tmjax merge`.")],
    flags: FuseFlags,
    job: JobFlags,
    output: OutputFlags,
) -> None:
    """Fuse, evaluate and report from an existing alignment, perhaps with another alpha."""
    from tmjax.commands.merge.run import Merge, open_run

    changes = {name: value for name, value in vars(flags).items() if value is not None}
    settings = open_run(run, changes)
    if changes.keys() - {"mesh"} and (run / "merged").exists() and not output.overwrite:
        raise InputError(f"{run} already holds a merge; pass --overwrite to fuse it again with other settings")
    with join_job(job), progress_display() as (progress, warn):
        manifest = Merge(settings, amend=True, progress=progress, warn=warn).all()
    show_run(settings.out, manifest, output.as_json)
