"""Words of the code: the field's own names for things, and docstrings of the public modules with all their parts."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tmjax"
#: Names that do not name the thing.
VAGUE = {"told", "held", "found", "what", "also", "here", "said", "instead", "most", "least", "reach"}
#: Words for which the field has others, as any part of a name.
PRIVATE = {"taught", "teaching", "lesson", "lessons", "wanted"}
#: Modules whose docstrings are the reference; a protocol's methods are documented there alone.
PUBLIC = (
    "api.py",
    "transfer/operator.py",
    "transfer/contribution.py",
    "transfer/source_view.py",
    "transfer/operators",
    "models/families/base.py",
)
INHERITED = {"apply", "contribute", "memory", "rows", "scaled"}


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Names that a module gives: variables, parameters, fields, functions, classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def private_words() -> dict[str, list[str]]:
    """The private words of every module that has any."""
    words = {
        file.relative_to(PACKAGE).as_posix(): [
            name
            for name in identifiers(ast.parse(file.read_text()))
            if name.lower() in VAGUE or set(name.lower().split("_")) & PRIVATE
        ]
        for file in sorted(PACKAGE.rglob("*.py"))
    }
    return {path: names for path, names in words.items() if names}


def test_no_private_word_is_an_identifier() -> None:
    assert private_words() == {}


def public_functions(node: ast.AST, *, method: bool = False) -> Iterator[tuple[ast.FunctionDef, bool]]:
    """Public functions of a module, and the public methods of its public classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child, method=True)
        elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            yield child, method


def missing_parts(function: ast.FunctionDef, method: bool) -> list[str]:
    """Parameters and sections that a docstring lacks."""
    text = inspect.cleandoc(ast.get_docstring(function) or "")
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)][int(method) :]
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    lacking = [name for name in names if section is None or not re.search(rf"^\s+{name}: ", section[1], re.MULTILINE)]
    returns = function.returns is not None and ast.unparse(function.returns) not in ("None", "NoReturn")
    is_property = any("property" in ast.unparse(each) for each in function.decorator_list)
    in_summary = text.startswith(("Returns", "Whether"))
    if returns and not is_property and not in_summary and "Returns:" not in text:
        lacking.append("Returns")
    return lacking


PUBLIC_FILES = [
    file
    for name in PUBLIC
    for file in ([PACKAGE / name] if name.endswith(".py") else sorted((PACKAGE / name).glob("*.py")))
]


@pytest.mark.parametrize("file", PUBLIC_FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_public_docstrings_have_all_their_parts(file: Path) -> None:
    protocols = file.name in ("operator.py", "contribution.py")
    faults = {
        function.name: missing
        for function, method in public_functions(ast.parse(file.read_text()))
        if (protocols or not (method and function.name in INHERITED)) and (missing := missing_parts(function, method))
    }
    assert faults == {}


def test_the_functions_of_the_api_are_documented() -> None:
    from tmjax import api

    for name in api.__all__:
        (tree,) = ast.parse(inspect.getsource(getattr(api, name))).body
        assert missing_parts(tree, False) == [], name
