"""`tmjax solvers`."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from tmjax.cli.options import Alpha, Out, OutputFlags, Seed, TextFlags, names_of, recipe_of
from tmjax.cli.terminal import directory_line, progress_display, show_result


@dataclass(frozen=True)
class SolverFlags(TextFlags):
    """The recipe of a comparison, and the solvers that are compared."""

    out: Out = None
    solvers: Annotated[
        str, typer.Option("--solvers", help="Names, comma-separated; options as name:key=value:key=value.")
    ] = "sinkhorn,scaling"
    alpha: Alpha = None
    seed: Seed = None


def solvers(flags: SolverFlags, output: OutputFlags) -> None:
    """Compare OT solvers on the same real problems: time, certificate, what the maps explain, quality of the merge."""
    settings, names = recipe_of(flags), names_of(flags.solvers)
    with progress_display() as (progress, warn):
        from tmjax.commands.solvers.run import SolverComparison, parse_solver

        for name in names:
            parse_solver(name, settings.alignment)
        comparison = SolverComparison(settings, overwrite=output.overwrite, progress=progress, warn=warn)
        manifest = comparison.compare(names)

    def show(console: Any) -> None:
        from tmjax.report.solver_page import solver_rows
        from tmjax.report.tables import rich_table

        console.print(rich_table("Solvers on the same problems", *solver_rows(manifest)))
        console.print(directory_line(settings.out, "solvers.html", "plots"))

    show_result(manifest, show, as_json=output.as_json)
