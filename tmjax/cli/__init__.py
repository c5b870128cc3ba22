"""The command line: thin typer commands over `tmjax.commands`. Only results go to standard output.

A command is a file of `verbs` with a function of its name, and an entry of `COMMANDS`.
"""

from collections.abc import Callable, Mapping

from tmjax.cli.application import app, main, prepare, run
from tmjax.cli.options import with_flags
from tmjax.cli.verbs.adapt_command import adapt
from tmjax.cli.verbs.compare_command import compare
from tmjax.cli.verbs.convert_command import convert
from tmjax.cli.verbs.doctor_command import doctor, plan
from tmjax.cli.verbs.evaluate_command import evaluate
from tmjax.cli.verbs.merge_command import align, fuse, merge
from tmjax.cli.verbs.report_command import report
from tmjax.cli.verbs.solvers_command import solvers
from tmjax.cli.verbs.sweep_command import sweep
from tmjax.cli.verbs.vocabulary_command import vocabulary

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
        vocabulary,
        doctor,
        plan,
    )
}
for _name, _command in COMMANDS.items():
    app.command(_name)(with_flags(_command))
