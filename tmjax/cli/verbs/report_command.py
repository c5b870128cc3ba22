"""`tmjax report`."""

from pathlib import Path
from typing import Annotated

import typer

from tmjax.cli.options import Json
from tmjax.cli.terminal import progress_display, show_result


def report(
    run: Annotated[Path, typer.Argument(help="Run directory of `tmjax merge` or `tmjax fuse`.")],
    as_json: Json = False,
) -> None:
    """Write a merge's report.html again from its run directory: one page that needs no network."""
    from tmjax.commands.report import rebuild_report

    with progress_display() as (_, warn):
        page = rebuild_report(run, warn)
    result = {"run": str(run), "report": str(page)}
    show_result(result, lambda console: console.print(str(page), highlight=False, soft_wrap=True), as_json=as_json)
