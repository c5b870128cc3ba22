"""Tables of the config keys that transformers declares and reads for each family, written from its source text.

    python -m tools.config_keys            # writes tmjax/models/families/known_keys.json
    python -m tools.config_keys --check    # compares it with the installed transformers; exit code 2 if it differs

`tmjax` decides with this table whether a key of a `config.json` that no family field takes could change the forward
pass; see `tmjax/models/families/unread.py`. Nothing of transformers' modelling code is run: its files are parsed, so
PyTorch is not needed.

A key is *read* where the source holds `config.KEY`, `getattr(config, "KEY")`, `kwargs.pop("KEY")` or the like, `config`
being any name or attribute that ends in `config`, or `self` in a configuration class. Of a modelling file only what the
causal language model's class refers to counts, directly or through other definitions of the file.
"""

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from tmjax.cli import run
from tmjax.errors import InputError
from tmjax.models.families import FAMILIES
from tmjax.models.families.base import Family
from tmjax.models.families.unread import KNOWN_KEYS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
#: Modules that every model goes through: configuration, loading, rotary embedding, masks, caches, attention kernels.
SHARED = (
    "configuration_utils",
    "modeling_utils",
    "modeling_rope_utils",
    "masking_utils",
    "cache_utils",
    "modeling_flash_attention_utils",
    "integrations/eager_paged",
    "integrations/flash_attention",
    "integrations/flash_paged",
    "integrations/flex_attention",
    "integrations/heterogeneity/configuration_utils",
    "integrations/sdpa_attention",
    "integrations/sdpa_paged",
    "utils/generic",
    "utils/output_capturing",
)
#: Those of them whose classes are configurations themselves.
OWN = ("configuration_utils", "modeling_rope_utils")
#: Functions of a configuration class whose `kwargs` are the keys of `config.json` that are no fields.
_CONSTRUCTION = frozenset({"__post_init__", "convert_rope_params_to_dict"})
_LOOKUPS = frozenset({"pop", "get"})
_ATTRIBUTES = frozenset({"getattr", "hasattr"})


def _is_config(node: ast.AST, own: bool) -> bool:
    """Whether an expression is a configuration; `own`: `self` is one."""
    if isinstance(node, ast.Name):
        return node.id.endswith("config") or (own and node.id == "self")
    if isinstance(node, ast.Attribute):
        return node.attr.endswith("config")
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get_text_config"


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def keys_read(tree: ast.AST, *, own: bool = False) -> Iterator[str]:
    """Names of the keys that code reads from a configuration; `own`: it is a configuration class's."""
    calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if _is_config(node.value, own) and id(node) not in calls:
                yield node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1 and getattr(node.func, "id", None) in _ATTRIBUTES:
            if _is_config(node.args[0], own):
                yield _text(node.args[1]) or ""
        elif own and isinstance(node, ast.FunctionDef) and node.name in _CONSTRUCTION:
            yield from _looked_up(node)
        elif own and isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("_config_names"):
            yield from filter(None, map(_text, ast.walk(node.value)))  # a loop asks for each of them


def _looked_up(function: ast.FunctionDef) -> Iterator[str]:
    """Keys that a function takes out of its `kwargs`."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and node.args and getattr(node.func, "attr", None) in _LOOKUPS:
            if getattr(node.func.value, "id", None) == "kwargs":
                yield _text(node.args[0]) or ""
        elif isinstance(node, ast.Subscript) and getattr(node.value, "id", None) == "kwargs":
            yield _text(node.slice) or ""


def reachable(tree: ast.Module, start: str) -> list[ast.AST]:
    """The top-level definitions of a file that `start` refers to, directly or through others of them."""
    defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    found: dict[str, ast.AST] = {}
    wanted = [start]
    while wanted:
        name = wanted.pop()
        if name in defined and name not in found:
            found[name] = defined[name]
            wanted += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
    return list(found.values())


def _parsed(package: Path, path: str) -> ast.Module:
    file = package / f"{path}.py"
    if not file.is_file():
        raise InputError(f"{file} does not exist: this version of transformers is laid out differently")
    return ast.parse(file.read_text(encoding="utf-8"))


def _refuse_other_models(tree: ast.Module, model_type: str) -> None:
    """Raises InputError if a modelling file uses another model's, whose reads would be missed."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 2 and "modeling_" in (node.module or ""):
            raise InputError(f"transformers' {model_type} imports from {node.module}, which this tool does not follow")


def _kept(keys: Iterator[str]) -> set[str]:
    """Without what no config.json holds: names of modules' own machinery."""
    return {key for key in keys if key and not key.startswith("__")}


def family_keys(package: Path, family: Family) -> dict[str, list[str]]:
    """`declared`: fields of the configuration class; `read`: keys that the class or the forward pass reads."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family.model_type]
    folder = kind.__module__.split(".")[-2]
    module = kind.__module__.rsplit("configuration_", 1)[1]
    own = [base for base in kind.__mro__ if base.__module__.startswith("transformers.models.")]
    declared = {name for base in own for name in base.__annotations__}
    read = set(kind.attribute_map)  # other names for the keys that they stand for
    for base in own:
        path = base.__module__.removeprefix("transformers.").replace(".", "/")
        nodes = reachable(_parsed(package, path), base.__name__)
        read |= {key for node in nodes for key in keys_read(node, own=True)}
    modelling = _parsed(package, f"models/{folder}/modeling_{module}")
    _refuse_other_models(modelling, family.model_type)
    nodes = reachable(modelling, family.architecture)
    if not nodes:
        raise InputError(f"transformers' {family.model_type} has no class {family.architecture}")
    read |= {key for node in nodes for key in keys_read(node)}
    return {"declared": sorted(declared), "read": sorted(_kept(iter(read)))}


def rope_keys(package: Path) -> set[str]:
    """Keys of a dictionary of rotary settings that any kind of scaling reads."""
    found = set()
    for node in ast.walk(_parsed(package, "modeling_rope_utils")):
        if isinstance(node, ast.ClassDef) and node.name == "RopeParameters":
            found |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
        of = node.value if isinstance(node, ast.Subscript) else getattr(getattr(node, "func", None), "value", None)
        if "rope_parameters" in ast.unparse(of) if of is not None else False:
            keys = [node.slice] if isinstance(node, ast.Subscript) else getattr(node, "args", [])[:1]
            found |= {_text(key) for key in keys} - {None}
    return found


def table() -> dict[str, Any]:
    """The whole table; needs transformers, not torch."""
    package = Path(importlib.util.find_spec("transformers").origin).parent
    shared = {key for path in SHARED for key in keys_read(_parsed(package, path), own=path in OWN)}
    base = reachable(_parsed(package, "configuration_utils"), "PreTrainedConfig")[0]
    shared |= {item.target.id for item in base.body if isinstance(item, ast.AnnAssign)}
    return {
        "transformers": metadata.version("transformers"),
        "rope": sorted(rope_keys(package)),
        "shared": sorted(_kept(iter(shared))),
        "families": {name: family_keys(package, family) for name, family in sorted(FAMILIES.items())},
    }


@app.command()
def keys(check: Annotated[bool, typer.Option("--check", help="Compare instead of writing.")] = False) -> None:
    """Writes the table of config keys that the installed transformers declares and reads, or compares it."""
    made = json.dumps(table(), indent=1) + "\n"
    if not check:
        KNOWN_KEYS.write_text(made, encoding="utf-8")
    elif KNOWN_KEYS.read_text(encoding="utf-8") != made:
        raise InputError(f"{KNOWN_KEYS} is not what the installed transformers gives; run python -m tools.config_keys")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run(arguments, application=app, name="config_keys")


if __name__ == "__main__":
    sys.exit(main())
