"""`tmjax compare`."""

from pathlib import Path
from typing import Annotated

import typer

from tmjax.cli.options import Json, Overwrite
from tmjax.cli.terminal import open_console, print_json


def compare(
    results: Annotated[
        list[str],
        typer.Argument(help="Run directories, RUN:ARM, folders of `evaluate --out`; differences are to the first."),
    ],
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the differences (PNG).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    draws: Annotated[int, typer.Option(min=1, help="Bootstrap draws.")] = 10000,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Results on the same documents, pair by pair: differences with 95% intervals over documents."""
    from tmjax.commands.compare import compare_results, write_plot

    with write_plot(plot, overwrite=overwrite) as write:
        result = compare_results(results, draws=draws, seed=seed)
        write(result["compare"])
    if as_json:
        print_json(result)
        return
    from tmjax.report.comparison import compare_rows
    from tmjax.report.tables import rich_table

    open_console().print(rich_table("Pair by pair on the same documents", *compare_rows(result["compare"])))
    for note in result["notes"]:
        open_console().print(note, highlight=False)
