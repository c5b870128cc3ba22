"""`tmjax report`."""

from pathlib import Path
from typing import Annotated

import typer

from tmjax.cli.options import Json
from tmjax.cli.terminal import open_console, print_json, progress_display


def report(
    run: Annotated[Path, typer.Argument(help="Run directory of `tmjax merge` or `tmjax fuse`.")],
    as_json: Json = False,
) -> None:
    """Write a merge's report.html again from its run directory: one page that needs no network."""
    from tmjax.commands.report import rebuild_report

    with progress_display() as (_, warn):
        page = rebuild_report(run, warn)
    if as_json:
        print_json({"run": str(run), "report": str(page)})
    else:
        open_console().print(str(page), highlight=False, soft_wrap=True)
