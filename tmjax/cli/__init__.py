"""The command line: thin typer commands over `tmjax.commands`. Only results go to standard output.

A command is a function in a file of `verbs`, and an entry of `COMMANDS` or of `GROUPS`.
"""

from collections.abc import Callable, Mapping

import typer

from tmjax.cli.application import app, main, prepare, run
from tmjax.cli.options import with_flags
from tmjax.cli.verbs.adapt_command import adapt
from tmjax.cli.verbs.convert_command import convert
from tmjax.cli.verbs.doctor_command import doctor, plan
from tmjax.cli.verbs.evaluate_command import evaluate
from tmjax.cli.verbs.merge_command import align, fuse, merge
from tmjax.cli.verbs.recipe_command import check
from tmjax.cli.verbs.result_commands import compare, publish, report
from tmjax.cli.verbs.run_command import run as run_steps
from tmjax.cli.verbs.solvers_command import solvers
from tmjax.cli.verbs.sweep_command import sweep
from tmjax.cli.verbs.vocabulary_command import vocabulary

__all__ = ["COMMANDS", "GROUPS", "app", "main", "prepare", "run"]

#: Commands in the order of `tmjax --help`, by name; their docstrings are the help.
COMMANDS: Mapping[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        merge,
        align,
        fuse,
        adapt,
        run_steps,
        solvers,
        sweep,
        evaluate,
        report,
        compare,
        convert,
        vocabulary,
        publish,
        doctor,
        plan,
    )
}
#: Groups of commands: their help, and their commands by name.
GROUPS: Mapping[str, tuple[str, Mapping[str, Callable[..., None]]]] = {
    "recipe": ("Recipe files, before anything runs.", {"check": check}),
}
for _name, _command in COMMANDS.items():
    app.command(_name)(with_flags(_command))
for _group, (_help, _commands) in GROUPS.items():
    _inner = typer.Typer(name=_group, help=_help)
    for _name, _command in _commands.items():
        # The callback keeps a group of one command a group.
        _inner.callback()(lambda: None)
        _inner.command(_name)(with_flags(_command))
    app.add_typer(_inner)
