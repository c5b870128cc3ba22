"""`tmjax solvers`."""

from typing import Annotated

import typer

from tmjax.cli.options import (
    Alpha,
    Json,
    Out,
    Overwrite,
    RecipeFile,
    Seed,
    Source,
    Target,
    Test,
    TextFile,
    Valid,
    recipe_of,
)
from tmjax.cli.terminal import open_console, print_json, progress_display


def solvers(
    recipe: RecipeFile = None,
    source: Source = None,
    target: Target = None,
    texts: TextFile = None,
    valid: Valid = None,
    test: Test = None,
    out: Out = None,
    solvers: Annotated[
        str, typer.Option("--solvers", help="Names, comma-separated; options as name:key=value:key=value.")
    ] = "sinkhorn,scaling",
    alpha: Alpha = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare OT solvers on the same real problems: time, certificate, what the maps explain, quality of the merge."""
    settings = recipe_of(recipe, locals())
    names = list(dict.fromkeys(name.strip() for name in solvers.split(",") if name.strip()))
    with progress_display() as (progress, warn):
        from tmjax.commands.solvers.run import SolverComparison, parse_solver

        for name in names:
            parse_solver(name, settings.alignment)
        manifest = SolverComparison(settings, overwrite=overwrite, progress=progress, warn=warn).compare(names)
    if as_json:
        print_json(manifest)
        return
    from tmjax.report.solver_page import solver_rows
    from tmjax.report.tables import rich_table

    open_console().print(rich_table("Solvers on the same problems", *solver_rows(manifest)))
    open_console().print(f"Run directory {settings.out} (with solvers.html, plots)")
