"""Whether a command could run as it is printed, without running it: programs, options, files."""

import argparse
import contextlib
import importlib
import importlib.util
import io
import itertools
import re
import shlex
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from tmjax import cli
from tmjax.commands.steps.resolve import resolve_steps
from tmjax.errors import TmjaxError
from tmjax.recipes.base import read_recipe
from tmjax.recipes.steps_recipe import build_steps_recipe, has_steps
from tmjax.transfer.recipe import build_recipe

#: Stands for something: DIR, T|RUN, FILE...; a command with one is a pattern, not for running as it is.
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*(\|[A-Z_]+)*(\.\.\.)?(:[A-Z]+)?|\.\.\.|…")
#: Folders of the checkout: a word that begins with one is a file of it.
FOLDERS = ("experiments/", "tests/", "tools/", "tmjax/", "docs/")
_OUTPUTS = ("out", "plot", "folder", "directory")
_INPUTS = ("recipe", "source", "target", "texts", "valid", "test", "other_texts", "run", "models", "model", "results")
#: Tools whose argument is where they write.
WRITERS = ("tools.verse_tasks", "tools.smollm2")
_counter = itertools.count()


class Dry:
    """Checks commands of documents against a checkout, in order: what a command writes, later ones may read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: set[str] = set()

    def faults(self, text: str, *, mark: str = "") -> list[str]:
        """What is wrong with a command; with a mark, names on the hub and of other machines are let through."""
        try:
            told = shlex.split(text.replace("\\\n", " "), comments=True)
        except ValueError as error:
            return [f"not a command: {error}"]
        while told and re.fullmatch(r"[A-Z_]+=.*", told[0]):
            told = told[1:]
        if not told:
            return []
        pattern = is_pattern(told)
        program, rest = told[0], told[1:]
        elsewhere = bool(mark) and mark.startswith("needs")
        found: list[str] = []
        if not pattern and program != "tmjax" and not elsewhere:
            found += self._missing(rest)
            if found:
                return found
        if program == "tmjax":
            found += self._tmjax(rest, pattern=pattern, elsewhere=elsewhere)
        elif program == "python":
            found += self._python(rest, pattern=pattern)
        elif program == "make":
            found += self._make(rest)
        elif program == "pip":
            found += self._pip(rest)
        elif program == "pytest":
            pass  # its files were looked for
        elif elsewhere:
            found += self._inside(told)
        else:
            found.append(f"{program} is not a program that the check knows; mark the command (# needs ...)")
        return found

    def _exists(self, name: str) -> bool:
        inside = any(f"{name}/".startswith(f"{made}/") or f"{made}/".startswith(f"{name}/") for made in self.made)
        return inside or (self.root / name).exists()

    def _missing(self, told: Sequence[str]) -> list[str]:
        """Words that name a file of the checkout, or of a run, that is not there."""
        after = {b for a, b in itertools.pairwise(told) if a.lstrip("-") in _OUTPUTS}
        named = [word for word in told if word.startswith((*FOLDERS, "runs/")) and word not in after]
        if any(word in WRITERS for word in told):  # their argument is where they write
            self.made |= set(named)
            named = []
        return [f"no {word}, nor does a command before this one write it" for word in named if not self._exists(word)]

    # Programs.

    def _tmjax(self, told: Sequence[str], *, pattern: bool, elsewhere: bool) -> list[str]:
        group = typer.main.get_command(cli.app)
        if not told or told[0] not in group.commands:
            return [f"tmjax has no command {told[0] if told else ''}".rstrip()]
        command = group.commands[told[0]]
        if hasattr(command, "commands"):  # a group
            if told[1:2] == [] or told[1] not in command.commands:
                return [f"tmjax {told[0]} has no command {told[1] if told[1:] else ''}".rstrip()]
            command, told = command.commands[told[1]], [f"{told[0]} {told[1]}", *told[2:]]
        if pattern:
            return _unknown_options(command, told[1:], f"tmjax {told[0]}")
        params, fault = _parsed(command, told[0], told[1:])
        if fault:
            return [fault]
        found = []
        for name in _INPUTS:
            value = params.get(name)
            for item in value if isinstance(value, list | tuple) else [value]:
                if item is None or str(item).startswith("hf:"):
                    continue
                where = re.sub(r":(control:)?\w+$", "", str(item)) if name == "results" else str(item)
                local = where.startswith((*FOLDERS, "runs/")) or not elsewhere
                if local and not self._exists(where):
                    found.append(f"no {where}, nor does a command before this one write it")
        self.made |= {str(params[name]) for name in _OUTPUTS if params.get(name) is not None}
        recipe = params.get("recipe")
        if recipe is not None and (self.root / recipe).is_file() and params.get("out") is None:
            self.made.add(str(read_recipe(self.root / recipe).get("out")))
        return found

    def _python(self, told: Sequence[str], *, pattern: bool) -> list[str]:
        if told[:1] == ["-m"] and not told[1].startswith(("tools.", "tmjax.")):
            return [] if importlib.util.find_spec(told[1]) else [f"no module {told[1]}"]
        if told[:1] == ["-m"]:
            file = self.root / (told[1].replace(".", "/") + ".py")
            file = file if file.is_file() else file.with_suffix("") / "__main__.py"
            rest = told[2:]
        else:
            file, rest = self.root / told[0], told[1:]
        if not file.is_file():
            return [f"no {told[1] if told[0] == '-m' else told[0]}"]
        params, fault = _script(file, rest, pattern=pattern)
        self.made |= {str(params[name]) for name in _OUTPUTS if params.get(name) is not None}
        return [fault] if fault else []

    def _make(self, told: Sequence[str]) -> list[str]:
        makefile = (self.root / "Makefile").read_text(encoding="utf-8")
        if "demo" in told:
            self.made.add("runs/swahili")
        return [f"make has no target {t}" for t in told if not re.search(rf"^{re.escape(t)}:", makefile, re.MULTILINE)]

    def _pip(self, told: Sequence[str]) -> list[str]:
        extras = tomllib.loads((self.root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = [name for word in told for name in re.findall(r"(?:^\.|^tmjax|/tmjax)\[(.*)\]", word)]
        return [f"pyproject.toml has no extra {n}" for group in asked for n in group.split(",") if n not in extras]

    def _inside(self, told: Sequence[str]) -> list[str]:
        """tmjax commands that another program starts, as its arguments or in one of them."""
        found = []
        for number, word in enumerate(told):
            if word == "tmjax":
                found += self.faults(shlex.join(told[number:]), mark="needs")
            elif "tmjax " in word:
                for part in re.split(r"&&|;", word.partition("=")[2]):
                    if part.split()[:1] == ["tmjax"]:
                        found += self.faults(part, mark="needs")
        return found


def is_pattern(told: Sequence[str]) -> bool:
    """Whether words of a command stand for others."""
    return any(PLACEHOLDER.fullmatch(word) or word.startswith("[") or "|" in word for word in told)


def recipe_fault(text: str) -> str | None:
    """What is wrong with a part of a recipe of `tmjax merge`, or with a recipe of several steps."""
    import yaml

    try:
        given = {key: value for key, value in yaml.safe_load(text).items() if key != "include" and key[:2] != "x-"}
        required = ("target", "texts", "out", *(() if "sources" in given else ("source",)))
        values = dict.fromkeys(required, "-") | given
        if has_steps(given):
            resolve_steps(build_steps_recipe(values))
        else:
            build_recipe(values)
    except TmjaxError as error:
        return str(error)
    return None


def _unknown_options(command: Any, told: Sequence[str], name: str) -> list[str]:
    known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    bare = [word.strip("[]").partition("=")[0] for word in told]
    return [f"{name} has no option {word}" for word in bare if word.startswith("-") and word not in known]


def _parsed(command: Any, name: str, told: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """Parameters of a command line, or the parser's complaint."""
    try:
        return command.make_context(name, list(told)).params, None
    except Exception as error:  # typer may parse by click or by its own copy of it, whose errors differ
        told_by = getattr(error, "format_message", None)
        return {}, f"{name}: {told_by() if told_by else error}"


class _Done(Exception):
    """The arguments were parsed; nothing more is to be done."""


def _script(file: Path, told: Sequence[str], *, pattern: bool) -> tuple[dict[str, Any], str | None]:
    """Parses the arguments of a script of this repository by its own parser."""
    module = _load(file)
    app = getattr(module, "app", None)
    if app is None and "typer" in vars(module):
        app = typer.Typer(add_completion=False)
        app.command()(module.main)
    if isinstance(app, typer.Typer):
        command = typer.main.get_command(app)
        if pattern:
            return {}, "; ".join(_unknown_options(command, told, file.name)) or None
        return _parsed(command, file.name, told)
    if "argparse" not in vars(module) or pattern:
        return {}, None  # takes files alone
    return _by_argparse(module, file.name, told)


def _by_argparse(module: Any, name: str, told: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    original, argv = argparse.ArgumentParser.parse_args, sys.argv
    params: dict[str, Any] = {}

    def parse(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> argparse.Namespace:
        params.update(vars(original(self, *arguments, **options)))
        raise _Done

    argparse.ArgumentParser.parse_args, sys.argv = parse, [name, *told]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            module.main()
    except _Done:
        return params, None
    except SystemExit:
        return {}, complaint.getvalue().strip().splitlines()[-1]
    finally:
        argparse.ArgumentParser.parse_args, sys.argv = original, argv
    return {}, f"{name} does not parse its arguments first"


def _load(file: Path) -> Any:
    """A script as a module of its own; what it imports from its folder is forgotten again."""
    spec = importlib.util.spec_from_file_location(f"_docs_check_{next(_counter)}", file)
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
        for name in set(sys.modules) - before:
            where = getattr(sys.modules[name], "__file__", None)
            if where and Path(where).parent == file.parent and name != spec.name:
                del sys.modules[name]
    return module
