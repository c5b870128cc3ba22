"""`tmjax compare`, `tmjax report`, `tmjax publish`, and publication at the end of a run."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tmjax.cli.options import Draws, Json, OutputFlags, Public, PublishFlags
from tmjax.cli.terminal import outside_bars, print_warning, progress_display, show_published, show_result
from tmjax.errors import InputError
from tmjax.sharding import job


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


def publish(
    run: Annotated[Path, typer.Argument(help="Run directory of a finished merge or adaptation.")],
    repository: Annotated[str, typer.Argument(help="OWNER/MODEL on the Hugging Face hub.")],
    lora: Annotated[bool, typer.Option("--lora", help="Upload the LoRA of the result (`export: {lora: 32}`).")] = False,
    public: Public = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes; ask and upload nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Upload the result of a finished run to the Hugging Face hub, with its model card; private unless --public."""
    from tmjax.commands.publish import publish

    with outside_bars() as progress:
        done = publish(
            run, repository, lora=lora, public=public, dry_run=dry_run, progress=progress, warn=print_warning
        )
    show_result({"run": str(run), **asdict(done)}, lambda console: show_published(console, done), as_json=as_json)


def publication(flags: PublishFlags) -> Callable[[Path], Any]:
    """Checks, before a run, that its result can be published.

    Args:
        flags: The flags of the run.

    Returns:
        A function that publishes the result of the run directory; of a run without the flag it returns None.

    Raises:
        InputError: There is no token, the repository is another's, or the hub refuses.
    """
    name = flags.push_to_hub
    if name is None:
        if flags.public:
            raise InputError("--public goes with --push-to-hub")
        return lambda run: None
    from tmjax.sharding import hosts

    first = not job.silent()

    def check() -> None:
        from tmjax.commands.publish import find_repository

        if first:
            find_repository(name, public=flags.public)

    def work(run: Path) -> Any:
        from tmjax.commands.publish import publish

        def upload() -> Any:
            if not first:
                return None
            try:
                with outside_bars() as progress:
                    return publish(run, name, public=flags.public, progress=progress, warn=print_warning)
            except InputError as error:
                raise InputError(f"{error} (the run is finished: tmjax publish {run} {name} goes on)") from None

        return hosts.together(upload)

    hosts.together(check)
    return work
