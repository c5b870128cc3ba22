"""`tmjax compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tmjax.cli.options import Draws, OutputFlags
from tmjax.cli.terminal import show_result


def compare(
    results: Annotated[
        list[str],
        typer.Argument(help="Run directories, RUN:ARM, folders of `evaluate --out`; differences are to the first."),
    ],
    *,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the differences (PNG).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    draws: Draws = 10000,
    output: OutputFlags,
) -> None:
    """Results on the same documents, pair by pair: differences with 95% intervals over documents."""
    from tmjax.commands.compare import compare_results, write_plot

    with write_plot(plot, overwrite=output.overwrite) as write:
        result = compare_results(results, draws=draws, seed=seed)
        write(result["compare"])

    def show(console: Any) -> None:
        from tmjax.report.comparison import compare_rows
        from tmjax.report.tables import rich_table

        console.print(rich_table("Pair by pair on the same documents", *compare_rows(result["compare"])))
        for note in result["notes"]:
            console.print(note, highlight=False)

    show_result(result, show, as_json=output.as_json)
