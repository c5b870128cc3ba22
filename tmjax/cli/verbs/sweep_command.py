"""`tmjax sweep`."""

import contextlib
import os
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from tmjax.cli.application import join_job
from tmjax.cli.options import Alpha, JobFlags, Mesh, Out, OutputFlags, Preset, Seed, TextFlags, recipe_of
from tmjax.cli.terminal import directory_line, live_display, show_result


def use_every_core() -> None:
    """Makes one CPU device per core, over which settings are split, unless devices were chosen already."""
    import jax

    if "device_count" in os.environ.get("XLA_FLAGS", "") or jax.config.jax_num_cpu_devices > 0:
        return
    with contextlib.suppress(RuntimeError):  # the backend has started
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", cores)


@dataclass(frozen=True)
class SweepFlags(TextFlags):
    """The recipe of a sweep, and the settings that are tried."""

    out: Out = None
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=a,b,c or KEY=low:high:step (ends included), repeatable. KEY: any dotted recipe key, or alpha, "
            "beta, epsilon, solver, alpha.PART, beta.PART with PART attention, mlp, q, k, v, o, gate, up or down. "
            "With --random also KEY=low..high and KEY=log:low..high."
        ),
    ] = None
    random: Annotated[int | None, typer.Option(min=1, help="Draw so many settings instead of all combinations.")] = None
    write_best: Annotated[bool, typer.Option("--write-best", help="Write the best setting's checkpoint to best/.")] = (
        False
    )
    preset: Preset = None
    alpha: Alpha = None
    seed: Seed = None
    mesh: Mesh = None


def sweep(flags: SweepFlags, job: JobFlags, output: OutputFlags) -> None:
    """Score many settings of a recipe on the validation texts: a grid or random draws, in one compiled program.

    Writes results.csv (results.parquet too where pyarrow is installed, the optional extra `sweep`), plots, sweep.html.
    """
    settings = recipe_of(flags)
    if settings.mesh is None:
        use_every_core()
    with join_job(job), live_display() as (progress, warn, show_rows):
        from tmjax.commands.sweep.run import Sweep

        run = Sweep(
            settings,
            flags.grid or [],
            random=flags.random,
            write_best=flags.write_best,
            overwrite=output.overwrite,
            progress=progress,
            warn=warn,
            show=show_rows,
        )
        manifest = run.sweep()

    def show(console: Any) -> None:
        from tmjax.report.sweep_page import sweep_summary

        console.print(sweep_summary(manifest, run.rows()), highlight=False)
        console.print(directory_line(settings.out, "results.csv", "results.parquet", "sweep.html", "best"))

    show_result(manifest, show, as_json=output.as_json)
