"""The shape of the package: imports go down, PyTorch is not loaded unasked; folders, names and functions stay small."""

import ast
import collections
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

#: Top-level modules and folders of the package, lowest level first; those on one level do not see each other.
LEVELS = (
    ("errors",),
    ("typing", "interrupt", "allocator", "plugins", "backend"),
    ("files",),
    ("sharding", "ot"),
    ("models",),
    ("checkpoints",),
    ("text",),
    ("recipes",),
    ("runs",),
    ("activations",),
    ("align",),
    ("evaluate",),
    ("teacher",),
    ("transfer",),
    ("train", "transplant"),
    ("report",),
    ("commands",),
    ("api",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FAMILIES = "models/families"
#: Parameter names of Hugging Face checkpoints, of which only the family tables know.
HF_NAMES = re.compile(
    r"[qkvo]_proj|(gate|up|down)_proj|self_attn|input_layernorm|post_attention_layernorm|embed_tokens|lm_head"
    r"|model\.layers|model\.norm\b"
)

PACKAGE = Path(__file__).resolve().parent.parent / "tmjax"
MODULES = {file.relative_to(PACKAGE).as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}


def owner(path: str) -> str:
    """Top-level folder or module of a file of the package."""
    return path.split("/")[0].removesuffix(".py")


def imports(path: str, tree: ast.AST) -> Iterator[str]:
    """Full dotted names of everything imported anywhere in a file: `from m import n` as m.n, `tmjax.m` where used."""
    package = ("tmjax", *path.split("/")[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if (alias.name, alias.asname) != ("tmjax", None))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join((*base, *filter(None, [node.module]), alias.name)) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tmjax":
            yield f"tmjax.{node.attr}"


def violations(path: str, source: str) -> list[str]:
    own = owner(path)
    found = []
    for name in imports(path, ast.parse(source)):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if top != "tmjax" or other in (own, "__version__"):
            continue
        if other not in LEVEL or LEVEL[other] >= LEVEL[own]:
            found.append(f"{path} imports {name}")
    return found


def test_every_module_has_a_level():
    assert {owner(path) for path in MODULES} - {"__init__"} <= set(LEVEL)


@pytest.mark.parametrize("path", [path for path in MODULES if path != "__init__.py"])
def test_imports_go_down(path):
    assert not violations(path, MODULES[path].read_text())


def module_name(path: str) -> str:
    return ".".join(("tmjax", *Path(path).with_suffix("").parts)).removesuffix(".__init__")


def test_no_module_needs_itself():
    """Imports within functions count as well: none of them hides a circle."""
    names = {module_name(path) for path in MODULES} - {"tmjax"}
    needs: dict[str, set[str]] = {}
    for path, file in MODULES.items():
        needs[module_name(path)] = set()
        for name in imports(path, ast.parse(file.read_text())):
            while name and name not in names:
                name = name.rpartition(".")[0]
            needs[module_name(path)] |= {name} - {"", module_name(path)}
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("files/x.py", "from tmjax.models.spec import DecoderSpec"),
        ("files/x.py", "def f():\n    from tmjax.ot import solve"),
        ("models/families/x.py", "if TYPE_CHECKING:\n    import tmjax.checkpoints.hf as hf"),
        ("models/x.py", "from ..checkpoints import hf"),
        ("models/families/x.py", "from ... import checkpoints"),
        ("models/x.py", "from tmjax import load_model"),
        ("commands.py", "from tmjax.cli import main"),
        ("teacher/x.py", "from tmjax.train.step import Objective"),
        ("errors.py", "import tmjax as everything"),
        ("errors.py", "import tmjax\nprint(tmjax.checkpoints)"),
    ],
)
def test_the_rule_sees_violations(path, source):
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/families/x.py", "from tmjax.models.spec import DecoderSpec\nfrom . import base\nfrom ..spec import x"),
        ("cli/x.py", "from tmjax import __version__\nfrom tmjax.commands import compare\nimport tmjax.text.documents"),
        ("files/x.py", "import tmjax\nprint(tmjax.__version__, tmjax.errors)"),
    ],
)
def test_the_rule_allows(path, source):
    assert not violations(path, source)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: everything outside functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import(child)


@pytest.mark.parametrize("path", MODULES)
def test_torch_is_never_imported_with_a_module(path):
    tree = ast.Module([n for n in at_import(ast.parse(MODULES[path].read_text())) if isinstance(n, ast.stmt)], [])
    flat = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [name for name in imports(path, ast.Module(flat, [])) if name.split(".")[0] == "torch"]


WITHOUT_TORCH = """
import importlib, importlib.machinery, importlib.util, sys

class Hidden(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "torch" else super().find_spec(name, path, target)

sys.meta_path = [Hidden if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
assert importlib.util.find_spec("torch") is None
for name in sys.argv[1:]:
    importlib.import_module(name)
assert "torch" not in sys.modules
"""


def test_every_module_imports_without_torch():
    """In an interpreter that does not find PyTorch (`sys.modules["torch"] = None` would upset scipy)."""
    names = [module_name(path) for path in MODULES]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", [path for path in MODULES if not path.startswith(FAMILIES)])
def test_checkpoint_names_stay_in_the_family_tables(path):
    lines = MODULES[path].read_text().splitlines()
    assert not [f"{path}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if HF_NAMES.search(line)]


def test_family_tables_are_where_the_names_are():
    assert any(HF_NAMES.search(MODULES[path].read_text()) for path in MODULES if path.startswith(FAMILIES))


def test_dataclasses_are_registered_by_our_own_function(repo) -> None:
    """See `tmjax.typing.pytree_dataclass` for why not by JAX's."""
    used = [path for path in (repo / "tmjax").rglob("*.py") if "@jax.tree_util.register_dataclass" in path.read_text()]
    assert used == []


#: Names that several folders may use, since the folder says the rest.
COMMON_NAMES = {"__init__", "__main__", "base", "run", "inputs"}
#: Folders of alternatives, one file each.
MANY_FILES = {"models/families", "ot/solvers"}


def test_no_folder_has_more_than_14_files() -> None:
    sizes = collections.Counter(str(Path(path).parent) for path in MODULES)
    assert {folder for folder, size in sizes.items() if size > 14} <= MANY_FILES


def test_module_names_are_unique() -> None:
    counts = collections.Counter(Path(path).stem for path in MODULES)
    assert {name for name, count in counts.items() if count > 1} <= COMMON_NAMES


#: Functions with more than 9 parameters, and why.
MANY_PARAMETERS = {
    "evaluate/lm_eval_model.py:TmjaxLM.__init__": "lm-eval makes the model from these keywords",
    "align/plans.py:solve_site": "benchmarks and tests vary one setting of an alignment at a time",
}
#: Those that are about to take one frozen object of settings.
MANY_PARAMETERS |= dict.fromkeys(
    (
        "activations/blocks.py:paired_blocks",
        "activations/capture.py:capture",
        "activations/extract.py:extract_activations",
        "models/decoder.py:Decoder.carry",
        "models/decoder.py:Decoder.run",
        "models/families/rope.py:read_rotary",
        "models/generate.py:begin",
        "models/generate.py:_go_on",
        "models/generate.py:write",
    ),
    "until captures, forward passes and generation take their settings as one object",
)


def functions(tree: ast.AST, place: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions of a module with their dotted places."""
    for child in ast.iter_child_nodes(tree):
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        inner = f"{place}{child.name}" if named else place
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inner, child
        yield from functions(child, f"{inner}." if named else place)


def parameter_count(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters of a function but `self` and `cls`; `*args` and `**options` count as one each."""
    given = function.args
    own = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return len([argument for argument in own if argument.arg not in ("self", "cls")])


def test_functions_have_at_most_9_parameters() -> None:
    many = {
        f"{path}:{name}"
        for path, file in MODULES.items()
        for name, function in functions(ast.parse(file.read_text()))
        if parameter_count(function) > 9
    }
    assert many <= set(MANY_PARAMETERS)


@pytest.mark.parametrize("path", MODULES)
def test_no_mapping_of_anything_to_anything(path) -> None:
    assert not re.search(r"(dict|Dict|Mapping)\[Any, *Any\]", MODULES[path].read_text())


#: Names of controls, which operators and stages never see.
CONTROLS = re.compile(r"\b(shuffled_rows|permuted_plan|random_source|zero_source|shrink)\b")
#: Where they are made, where an adaptation chooses its own, and tables of evaluations.
KNOW_CONTROLS = ("transfer/controls.py", "commands/adapt/arms.py", "report/")


@pytest.mark.parametrize("path", [path for path in MODULES if not path.startswith(KNOW_CONTROLS)])
def test_controls_are_known_to_their_own_modules_alone(path) -> None:
    assert not CONTROLS.search(MODULES[path].read_text())
