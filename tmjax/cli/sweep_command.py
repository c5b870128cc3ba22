"""`tmjax sweep`."""

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from tmjax.cli.application import join_job
from tmjax.cli.options import (
    Alpha,
    Coordinator,
    Distributed,
    Json,
    Mesh,
    Out,
    Overwrite,
    Preset,
    Process,
    Processes,
    RecipeFile,
    Seed,
    Source,
    Target,
    Test,
    TextFile,
    Valid,
    recipe_of,
)
from tmjax.cli.terminal import live_display, open_console, print_json
from tmjax.sharding import job


def use_every_core() -> None:
    """One CPU device per core, each of which takes settings of its own, unless devices were chosen already."""
    import jax

    if "device_count" in os.environ.get("XLA_FLAGS", "") or jax.config.jax_num_cpu_devices > 0:
        return
    with contextlib.suppress(RuntimeError):  # the backend has started
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", cores)


def sweep(
    recipe: RecipeFile = None,
    source: Source = None,
    target: Target = None,
    texts: TextFile = None,
    valid: Valid = None,
    test: Test = None,
    out: Out = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=a,b,c or KEY=low:high:step (ends included), repeatable. KEY: any dotted recipe key, or alpha, "
            "beta, epsilon, solver, alpha.PART, beta.PART with PART attention, mlp, q, k, v, o, gate, up or down. "
            "With --random also KEY=low..high and KEY=log:low..high."
        ),
    ] = None,
    random: Annotated[
        int | None, typer.Option(min=1, help="Draw so many settings instead of all combinations.")
    ] = None,
    write_best: Annotated[
        bool, typer.Option("--write-best", help="Write the best setting's checkpoint to best/.")
    ] = False,
    preset: Preset = None,
    alpha: Alpha = None,
    seed: Seed = None,
    mesh: Mesh = None,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    num_processes: Processes = None,
    process_id: Process = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score many settings of a recipe on the validation texts: a grid or random draws, in one compiled program.

    Writes results.csv (results.parquet too where pyarrow is installed, the optional extra `sweep`), plots, sweep.html.
    """
    settings = recipe_of(recipe, locals())
    if settings.mesh is None:
        use_every_core()
    with join_job(locals()), live_display() as (progress, warn, show):
        from tmjax.commands.sweep.run import Sweep

        run = Sweep(
            settings,
            grid or [],
            random=random,
            write_best=write_best,
            overwrite=overwrite,
            progress=progress,
            warn=warn,
            show=show,
        )
        manifest = run.sweep()
    if as_json or job.silent():
        print_json(manifest)
        return
    from tmjax.report.sweep_page import sweep_summary

    open_console().print(sweep_summary(manifest, run.rows()), highlight=False)
    done = [
        name
        for name in ("results.csv", "results.parquet", "sweep.html", "best")
        if (Path(settings.out) / name).exists()
    ]
    open_console().print(f"Run directory {settings.out} (with {', '.join(done)})")
