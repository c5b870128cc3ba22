"""Runs every command of the documents exactly as printed, and compares the output with the one that they show.

    python -m tools.docs_check                  # all documents; `make docs-check`
    python -m tools.docs_check README.md        # one
    python -m tools.docs_check --dry            # parses only: seconds; a test does the same
    python -m tools.docs_check --long           # also what the documents mark `# takes ...`

Commands marked `# needs ...` (the hub, a network, another machine) are parsed only. The others run in a temporary copy
of the checkout, without the hub. Notebooks are executed, and their outputs compared with the stored ones.
"""

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from tmjax import cli
from tmjax.errors import InputError
from tools.docs_check.check import ROOT, Runner, documents, notebooks, static_faults

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Documents; default: all of the checkout.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Only parse.")] = False,
    long: Annotated[bool, typer.Option("--long", help="Run what is marked `# takes` too.")] = False,
    keep: Annotated[Path | None, typer.Option(help="Work in this folder (absent or empty) and leave it.")] = None,
) -> None:
    """Checks the documents; fails if something in them is not so."""
    begin = time.perf_counter()
    paths = [*documents(), *notebooks()] if not names else [ROOT / name for name in names]
    gone = [path for path in paths if not path.is_file()]
    if gone:
        raise InputError(f"no document {gone[0]}")
    faults = static_faults(paths)
    if not dry and not faults:
        with contextlib.ExitStack() as stack:
            folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="docs-check-")))
            runner = Runner(folder.resolve(), long=long, say=lambda line: print(line, flush=True))
            for path in paths:
                faults += runner.document(runner.folder / path.relative_to(ROOT))
    for fault in faults:
        print(f"docs-check: {fault}", file=sys.stderr)
    if faults:
        raise InputError(f"{len(faults)} faults in {len(paths)} documents, listed above")
    print(f"{len(paths)} documents, no fault, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    sys.exit(cli.run(application=app, name="docs-check"))
