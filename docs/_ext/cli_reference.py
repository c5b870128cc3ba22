"""The reference of the command line, made of the commands' own parameters and help."""

from typing import Any

import typer
from markdown import table


def commands() -> str:
    """Returns every command of `tmjax`: usage, help, arguments and options."""
    from tmjax import cli

    group: Any = typer.main.get_command(cli.app)
    return "".join(_command(name, group.commands[name]) for name in group.commands)


def _command(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    rows = [_row(parameter) for parameter in command.params]
    text = f"## `tmjax {name}`\n\n{(command.help or '').strip()}\n\n```text\ntmjax {name} {usage}\n```\n\n"
    return text + table(("parameter", "value", "default", "meaning"), [row for row in rows if row is not None])


def _row(parameter: Any) -> tuple[str, str, str, str] | None:
    if getattr(parameter, "hidden", False):
        return None
    option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if option else [parameter.metavar or (parameter.name or "").upper()]
    flag = getattr(parameter, "is_flag", False)
    value = "" if flag or not option else parameter.type.name
    if getattr(parameter, "multiple", False):
        value += ", repeatable"
    default = parameter.default
    shown = "" if default is None or flag or callable(default) or default == () else f"`{default}`"
    shown = "required" if parameter.required else shown
    return ", ".join(f"`{each}`" for each in names), value, shown, getattr(parameter, "help", None) or ""
