"""The command line: thin typer commands over `tmjax.commands`. Only results go to standard output.

A command is a file of this folder with a function of its name, and an entry of `COMMANDS`.
"""

from collections.abc import Callable, Mapping

from tmjax.cli.adapt_command import adapt
from tmjax.cli.application import app, main, prepare, run
from tmjax.cli.convert_command import convert
from tmjax.cli.doctor_command import doctor, plan
from tmjax.cli.evaluate_command import evaluate
from tmjax.cli.merge_command import align, fuse, merge
from tmjax.cli.options import with_flags
from tmjax.cli.result_commands import compare, publish, report
from tmjax.cli.solvers_command import solvers
from tmjax.cli.sweep_command import sweep

__all__ = ["COMMANDS", "app", "main", "prepare", "run"]

#: Commands in the order of `tmjax --help`, by name; their docstrings are the help.
COMMANDS: Mapping[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        merge,
        align,
        fuse,
        adapt,
        solvers,
        sweep,
        evaluate,
        report,
        compare,
        convert,
        publish,
        doctor,
        plan,
    )
}
for _name, _command in COMMANDS.items():
    app.command(_name)(with_flags(_command))
