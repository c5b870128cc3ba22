"""The reference of the command line, made of the commands' own parameters and help."""

import enum
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union

from markdown_table import table
from typer.models import ArgumentInfo, CommandInfo, OptionInfo

_NAMES = {str: "text", float: "number", int: "integer", Path: "path", bool: ""}


def commands() -> str:
    """Returns every command of `tmjax`: usage, help, arguments and options."""
    from tmjax import cli

    own = [_command(command) for command in cli.app.registered_commands]
    inner = [
        _command(command, f"{group.typer_instance.info.name} ")
        for group in cli.app.registered_groups
        if group.typer_instance is not None
        for command in group.typer_instance.registered_commands
    ]
    return "".join([*own, *inner])


def _command(command: CommandInfo, lead: str = "") -> str:
    function: Callable[..., None] | None = command.callback
    assert function is not None
    name = lead + (command.name or function.__name__.strip("_").replace("_", "-"))
    hints = typing.get_type_hints(function, include_extras=True)
    usage, rows = [f"tmjax {name}"], []
    for key, parameter in inspect.signature(function).parameters.items():
        annotation, info = _parts(hints[key])
        if info is None or info.hidden:
            continue
        required = parameter.default is inspect.Parameter.empty
        value = _value(annotation)
        if isinstance(info, OptionInfo):
            shown = _options(key, info, annotation)
        else:
            shown = info.metavar or key.upper()
            usage.append(shown + ("..." if "repeatable" in value else "") if required else f"[{shown}]")
        rows.append((f"`{shown}`", value, _default(parameter.default), info.help or ""))
    text = command.help or inspect.getdoc(function) or ""
    lines = " ".join((*usage, "[OPTIONS]"))
    columns = ("parameter", "value", "default", "meaning")
    return f"## `tmjax {name}`\n\n{text.strip()}\n\n```text\n{lines}\n```\n\n" + table(columns, rows)


def _parts(hint: Any) -> tuple[Any, OptionInfo | ArgumentInfo | None]:
    """The type of a parameter, without None, and its entry for typer."""
    annotation, *extras = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    info = next((extra for extra in extras if isinstance(extra, OptionInfo | ArgumentInfo)), None)
    if typing.get_origin(annotation) in (Union, types.UnionType):
        inner = [each for each in typing.get_args(annotation) if each is not type(None)]
        if info is None and len(inner) == 1:  # Annotated inside of Optional
            return _parts(inner[0])
        annotation = inner[0] if len(inner) == 1 else annotation
    return annotation, info


def _value(annotation: Any) -> str:
    if typing.get_origin(annotation) in (list, tuple):
        return f"{_value(typing.get_args(annotation)[0])}, repeatable"
    if typing.get_origin(annotation) is Literal:
        return ", ".join(f"`{each}`" for each in typing.get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return ", ".join(f"`{each.value}`" for each in annotation)
    return _NAMES.get(annotation, "text")


def _options(key: str, info: OptionInfo, annotation: Any) -> str:
    # The first name of an option stands where its default would, if it were no annotation.
    names = [each for each in (info.default, *(info.param_decls or ())) if isinstance(each, str)]
    if names:
        return ", ".join(names)
    dashed = key.replace("_", "-")
    return f"--{dashed} / --no-{dashed}" if annotation is bool else f"--{dashed}"


def _default(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return "required"
    return "" if default is None or default is False or default == [] else f"`{default}`"
