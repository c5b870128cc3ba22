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
    PublishFlags,
    Test,
    Valid,
    recipe_of,
)
from tmjax.cli.terminal import progress_display, show_run
from tmjax.cli.verbs.result_commands import publication
from tmjax.errors import InputError

#: The flags of a command that publishes nothing.
NOWHERE = PublishFlags()


def _run(
    settings: Any,
    stages: Callable[[Any], object],
    job: JobFlags,
    output: OutputFlags,
    publishing: PublishFlags = NOWHERE,
    *,
    amend: bool = False,
) -> None:
    """Runs stages of a merge, publishes its result if flags say so, and prints it."""
    with join_job(job):
        from tmjax.commands.merge.run import Merge
        from tmjax.report.tables import run_summary

        publish = publication(publishing)
        with progress_display() as (progress, warn):
            overwrite = output.overwrite and not amend
            merge = Merge(settings, overwrite=overwrite, amend=amend, progress=progress, warn=warn)
            stages(merge)
            manifest = merge.run.manifest.to_json()
        published = publish(Path(settings.out))
    show_run(settings.out, manifest, run_summary, published, as_json=output.as_json)


def merge(flags: MergeFlags, publishing: PublishFlags, job: JobFlags, output: OutputFlags) -> None:
    """Merge a source model into a target model: all stages, controls, evaluation, report."""
    _run(recipe_of(flags), lambda merge: merge.all(), job, output, publishing)


def align(flags: MergeFlags, job: JobFlags, output: OutputFlags) -> None:
    """Only activations and alignment; `tmjax fuse RUN` goes on from there."""
    _run(recipe_of(flags), lambda merge: merge.align(), job, output)


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
    publishing: PublishFlags,
    job: JobFlags,
    output: OutputFlags,
) -> None:
    """Fuse, evaluate and report from an existing alignment, perhaps with another alpha."""
    from tmjax.commands.merge.run import open_run

    changes = {name: value for name, value in vars(flags).items() if value is not None}
    settings = open_run(run, changes)
    if changes.keys() - {"mesh"} and (run / "merged").exists() and not output.overwrite:
        raise InputError(f"{run} already holds a merge; pass --overwrite to fuse it again with other settings")
    _run(settings, lambda merge: merge.all(), job, output, publishing, amend=True)
