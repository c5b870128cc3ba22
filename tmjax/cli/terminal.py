"""Results on standard output; progress, warnings and live tables on standard error."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tmjax import interrupt
from tmjax.sharding import job


def print_json(value: Any) -> None:
    """Prints one JSON object on standard output, in the first process of a job."""
    if job.silent():
        return
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # because of the stream's encoding, or a file name that is not valid text
        text = json.dumps(value, allow_nan=False)
    print(text)


def open_console(*, stderr: bool = False) -> Any:
    """Opens a console of rich, wide enough for tables where it is no terminal."""
    from rich.console import Console

    console = Console(stderr=stderr)
    # A pipe or a log has no width of its own; 80 columns would fold every table.
    return console if console.is_terminal else Console(stderr=stderr, width=120)


def show_result(result: Any, show: Callable[[Any], None], *, as_json: bool) -> None:
    """Prints the result of a command on standard output, in the first process of a job.

    Args:
        result: The result as one JSON object.
        show: Prints it for people, on the console that it is given.
        as_json: Whether it is printed as JSON.
    """
    if as_json or job.silent():
        print_json(result)
    else:
        show(open_console())


def directory_line(out: str, *names: str) -> str:
    """Returns the line that names a run directory and which of these files it holds."""
    present = [name for name in names if (Path(out) / name).exists()]
    return f"Run directory {out}" + (f" (with {', '.join(present)})" if present else "")


def print_note(console: Any, note: str) -> None:
    """Prints a note on a checkpoint on one line, without markup."""
    console.print(f"Note: {note}", highlight=False, markup=False, soft_wrap=True)


def print_warning(message: str) -> None:
    """Prints a warning on standard error, on one line."""
    print(f"tmjax: warning: {' '.join(message.split())}", file=sys.stderr)


def show_published(console: Any, done: Any) -> None:
    """Prints what was uploaded, or would be."""
    for name, size in done.files.items():
        console.print(f"{size:>15,}  {name}", highlight=False, markup=False)
    seen = "public" if done.public else "private"
    total = f"{len(done.files)} files, {sum(done.files.values()):,} bytes"
    where = f"{done.repository} ({seen})"
    line = f"{total} would go to {where}; nothing was uploaded" if done.commit is None else f"{total} -> {where}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    if done.commit is not None:
        console.print(done.commit, highlight=False, markup=False, soft_wrap=True)


def show_run(
    out: str,
    manifest: dict[str, Any],
    summary: Callable[[dict[str, Any]], Any],
    published: Any = None,
    *,
    as_json: bool,
) -> None:
    """Prints the result of a run: its manifest as JSON, or a summary and the content of its directory.

    Args:
        out: The run directory.
        manifest: Its manifest.
        summary: Makes the summary of a manifest.
        published: The upload of the result, if there was one.
        as_json: Whether JSON is printed.
    """

    def show(console: Any) -> None:
        console.print(summary(manifest))
        console.print(directory_line(out, "merged", "lora", "report.html", "plots"))
        if published is not None:
            show_published(console, published)

    result = manifest if published is None else manifest | {"published": asdict(published)}
    show_result(result, show, as_json=as_json)


@contextlib.contextmanager
def progress_display() -> Iterator[tuple[Callable[..., None], Callable[[str], None]]]:
    """Shows progress on standard error.

    Yields:
        A function of (stage, done, total, note), and one that prints a warning above the display.
    """
    from tmjax.report.progress import Bars, Lines

    if job.silent():
        yield interrupt.checked(lambda stage, done, total, note="": None), lambda message: None
        return
    console = open_console(stderr=True)
    with Bars(console) if console.is_terminal else Lines(sys.stderr) as display:
        yield interrupt.checked(display.step), lambda message: display.say(f"tmjax: warning: {message}")


@contextlib.contextmanager
def outside_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Shows the progress of a stage whose library has bars of its own: as lines, where there is no terminal.

    Yields:
        A function of (stage, done, total).
    """
    if sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    with progress_display() as (progress, _):
        yield progress


@contextlib.contextmanager
def live_display() -> Iterator[tuple[Callable[..., None], Callable[[str], None], Callable[[Any, int], None]]]:
    """Shows progress and a sweep's rows so far on standard error.

    Yields:
        The two functions of `progress_display`, and one that shows a table, of (rows, number of all settings).
    """
    from rich.console import Group
    from rich.live import Live

    from tmjax.report.progress import Bars, Lines
    from tmjax.report.sweep_page import live_table

    if job.silent():
        yield interrupt.checked(lambda stage, done, total: None), lambda message: None, lambda rows, total: None
        return
    console = open_console(stderr=True)
    if not console.is_terminal:
        with Lines(sys.stderr) as lines:
            yield (
                interrupt.checked(lines.step),
                lambda message: lines.say(f"tmjax: warning: {message}"),
                lambda rows, total: None,
            )
        return
    bars = Bars(console)
    shown = [0.0]
    with Live(bars.display, console=console, refresh_per_second=4) as display:

        def show(rows: Any, total: int) -> None:
            if len(rows) == total or time.monotonic() > shown[-1] + 0.5:
                display.update(Group(bars.display, live_table(rows, total)))
                shown[:] = [time.monotonic()]

        yield interrupt.checked(bars.update), lambda message: bars.say(f"tmjax: warning: {message}"), show
