"""The command line: thin typer commands over `tmjax.commands`. Results to standard output, all else to standard error.

A command is a file of this folder with a function of its name, and an entry of `COMMANDS`.
"""

from collections.abc import Callable, Mapping

from tmjax.cli.adapt_command import adapt
from tmjax.cli.application import app, main, prepare, run
from tmjax.cli.compare_command import compare
from tmjax.cli.convert_command import convert
from tmjax.cli.doctor_command import doctor
from tmjax.cli.evaluate_command import evaluate
from tmjax.cli.merge_command import align, fuse, merge
from tmjax.cli.report_command import report
from tmjax.cli.solvers_command import solvers
from tmjax.cli.sweep_command import sweep

__all__ = ["COMMANDS", "app", "main", "prepare", "run"]

#: Commands in the order of `tmjax --help`, each with its help; None: the function's docstring.
COMMANDS: Mapping[str, tuple[Callable[..., None], str | None]] = {
    "merge": (merge, "Merge a source model into a target model: all stages, controls, evaluation, report."),
    "align": (align, "Only activations and alignment; `tmjax fuse RUN` goes on from there."),
    "fuse": (fuse, None),
    "adapt": (adapt, None),
    "solvers": (solvers, None),
    "sweep": (sweep, None),
    "evaluate": (evaluate, None),
    "report": (report, None),
    "compare": (compare, None),
    "convert": (convert, None),
    "doctor": (doctor, None),
}
for _name, (_function, _help) in COMMANDS.items():
    app.command(_name, help=_help)(_function)
