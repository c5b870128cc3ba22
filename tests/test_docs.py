"""Documents: everything in ours parses, and each kind of mistake in one is found (`make docs-check` runs them)."""

import ast
import importlib
import json
import re
from collections.abc import Iterator

import pytest
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tmjax.recipes.adapt import AdaptRecipe
from tmjax.recipes.merge import Recipe
from tmjax.recipes.steps_recipe import PLAIN_STEPS, StepsRecipe
from tmjax.transfer.operator import builtin_operators
from tools.docs_check.blocks import commands, read_document
from tools.docs_check.check import ROOT, Runner, contents, documents, notebooks, static_faults
from tools.docs_check.compare import table_fault, text_fault
from tools.docs_check.notebook import differences, notebook_faults

# Scripts that the documents name are imported for their options: third-party deprecations of what they import.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def faults(folder, text: str, name: str = "page.md") -> list[str]:
    (folder / name).write_text(text)
    return static_faults([folder / name])


#: Headings that pages of the site get from the code.
GENERATED = {"recipes.md": set(), "cli.md": set(), "api.md": set()}
NOTE = "<!-- docs-check: printed by {}, within 0.01 -->"
TABLE = "| a | b |\n|---|---|\n| x | 1.0 |\n"


def fenced(*lines: str, language: str = "sh") -> str:
    return "\n".join([f"```{language}", *lines, "```", ""])


def test_ours_parse() -> None:
    found = documents()
    names = [path.relative_to(ROOT).as_posix() for path in found]
    assert names[:3] == ["README.md", "docs/index.md", "docs/quickstart.md"]
    assert {"CONTRIBUTING.md", "docs/design.md", "docs/limits.md", "experiments/transfer/README.md"} <= set(names)
    assert static_faults(found) == []


def test_the_notebook_is_stored_with_outputs_that_name_no_machine() -> None:
    assert [path.name for path in notebooks()] == ["tutorial.ipynb"]
    assert static_faults(notebooks()) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_every_page_is_in_the_tables_of_contents() -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages |= {path.stem for path in notebooks()}
    listed = contents(ROOT / "docs/index.md")
    assert len(listed) == len(set(listed)) and {*listed, "index"} == pages


def test_links_lead_to_files_and_headings() -> None:
    """Relative links of all documents, as a reader of the repository follows them."""
    for document in documents():
        text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
            if "://" in target:
                continue
            file = (document.parent / target).resolve() if target else document
            assert file.exists(), f"{document.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in slugs | GENERATED.get(file.name, set()), f"{document.name}: {target}#{anchor}"


def test_what_pages_ask_to_be_generated_exists() -> None:
    """Names after `generated:` are files, or keys of the site's extension, which imports Sphinx and so is only read."""
    tree = ast.parse((ROOT / "docs/_ext/generated.py").read_text(encoding="utf-8"))
    (table,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "GENERATORS"
    ]
    known = {ast.literal_eval(key) for key in table.keys}
    asked = {
        name
        for page in (ROOT / "docs").rglob("*.md")
        for name in re.findall(r"<!-- generated: (.+?) -->", page.read_text(encoding="utf-8"))
    }
    assert known <= asked
    assert all((ROOT / name).is_file() for name in asked - known)


def test_a_command_has_a_row_in_the_tables_of_commands() -> None:
    from tmjax import cli

    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    for page in ("README.md", "docs/quickstart.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert names <= set(re.findall(r"`tmjax (\w+)", text)), page


def test_the_reference_of_commands_names_every_flag(monkeypatch) -> None:
    from tmjax import cli

    monkeypatch.syspath_prepend(str(ROOT / "docs/_ext"))
    reference = importlib.import_module("cli_reference").commands()
    commands = {
        f"{name} {inner}".strip(): each
        for name, command in typer.main.get_command(cli.app).commands.items()
        for inner, each in getattr(command, "commands", {"": command}).items()
    }
    for name, command in commands.items():
        (text,) = re.findall(rf"^## `tmjax {name}`$(.*?)(?=^## |\Z)", reference, flags=re.MULTILINE | re.DOTALL)
        flags = {flag for each in command.params for flag in (*each.opts, *each.secondary_opts) if flag.startswith("-")}
        assert set(re.findall(r"(--[\w-]+)", "".join(re.findall(r"^\| (`.*?`) \|", text, flags=re.M)))) == flags, name


def sections(kind: type[BaseModel], place: str) -> Iterator[tuple[str, FieldInfo]]:
    """All settings of a section and of those inside it, by their dotted keys."""
    for name, field in kind.model_fields.items():
        yield f"{place}.{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation, f"{place}.{name}")


def test_every_setting_has_a_description() -> None:
    """The reference of recipes shows it beside type and default."""
    kinds: dict[str, type[BaseModel]] = {"merge": Recipe, "adapt": AdaptRecipe, "steps": StepsRecipe, **PLAIN_STEPS}
    kinds |= {name: operator.options for name, operator in builtin_operators().items()}
    found = [entry for name, kind in kinds.items() for entry in sections(kind, name)]
    assert len(found) > 150 and [place for place, field in found if not field.description] == []


def test_what_is_wrong_with_a_notebook_is_found(tmp_path) -> None:
    def notebook(source: str, *outputs: dict) -> dict:
        cell = {"cell_type": "code", "source": [source], "outputs": list(outputs), "metadata": {}}
        return {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}

    def printed(text: str) -> dict:
        return {"output_type": "stream", "name": "stdout", "text": [text]}

    path = tmp_path / "page.ipynb"
    for page, fault in (
        (notebook("x = 1"), "no stored outputs"),
        (notebook("x =", printed("1")), "is not Python"),
        (notebook("x", printed("read /home/me/texts")), "path of a machine"),
        (notebook("x", {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}), "is an error"),
    ):
        path.write_text(json.dumps(page))
        (found,) = notebook_faults(path)
        assert fault in found
    path.write_text(json.dumps(notebook("x", printed("1.9895 bits"))))
    assert notebook_faults(path) == []
    old, near, far = (notebook("x", printed(f"{value} bits")) for value in (1.9895, 1.9899, 1.95))
    assert differences(old, near, "page") == []
    (found,) = differences(old, far, "page")
    assert "page, cell 1: " in found and "'1.9895'" in found


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("tmjax merge experiments/swahili/recipe.yaml --alhpa 0.1", "No such option: --alhpa"),
        ("tmjax merge experiments/swahili/recipe.yaml --alpha many", "Invalid value for '--alpha'"),
        ("tmjax blend experiments/swahili/recipe.yaml", "tmjax has no command blend"),
        ("tmjax merge experiments/swahili/recipes.yaml", "no experiments/swahili/recipes.yaml"),
        ("tmjax evaluate --texts experiments/swahili/texts/swahili.test.jsonl", "Missing argument 'models'"),
        ("tmjax evaluate runs/none/merged --tasks a --tasks-dir tests", "no runs/none/merged"),
        ("tmjax adapt --target T|RUN --texts F --steep 3", "tmjax adapt has no option --steep"),
        ("tmjax merge A/B --no-flag  # needs the hub", "No such option: --no-flag"),
        ("srun -n 2 tmjax merge recipe.yaml --distribute  # needs SLURM", "No such option: --distribute"),
        ("python experiments/bench/gone.py", "no experiments/bench/gone.py"),
        ("python experiments/bench/scaling.py --out runs/x --slow", "No such option: --slow"),
        ("python experiments/transfer/study.py experiments/swahili/recipe.yaml --outer x", "--out"),
        ("python -m tools.family_table --case", "No such option: --case"),
        ("python -m pytest tests/test_gone.py", "no tests/test_gone.py"),
        ("make dmeo", "make has no target dmeo"),
        ("pip install -e '.[evaluation]'  # needs a network", "no extra evaluation"),
        ("cargo test", "cargo is not a program that the check knows"),
        ("tmjax merge 'experiments", "not a command"),
    ],
)
def test_a_command_that_could_not_run_is_found(line, told, tmp_path) -> None:
    found = faults(tmp_path, f"# Page\n\n{fenced('make demo', line)}")
    assert len(found) == 1 and told.lower() in found[0].lower() and found[0].startswith("page.md:5: ")


def test_commands_that_could_run_pass(tmp_path) -> None:
    block = fenced(
        "make demo     # two minutes",
        "tmjax merge experiments/swahili/recipe.yaml --alpha 0.1 \\",
        "            --out runs/x",
        "tmjax evaluate runs/x/merged runs/swahili/merged --texts experiments/swahili/texts/swahili.test.jsonl",
        "tmjax compare runs/x runs/swahili:control:shrink",
        "tmjax merge me/source.yaml  # needs the hub",
    )
    assert faults(tmp_path, block) == []
    assert faults(tmp_path, "Say `tmjax merge ... --controls`, `tmjax fuse RUN [--alpha X]` or `make demo`.") == []
    found = faults(tmp_path, "Say `tmjax merge ...\n--control`.")
    assert len(found) == 1 and "tmjax merge has no option --control" in found[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (fenced("x = ", language="python"), "is not Python"),
        (fenced("alpha: 2", language="yaml"), "alpha"),
        (fenced("alpah: 0.1", language="yaml"), "alpah: unknown key"),
        (fenced("bits 1.9", language="text"), "nothing says what prints this"),
        (fenced("bits 1.9", language=""), "a block that is no command"),
        (fenced("fn main", language="rust"), "no blocks of rust"),
        (
            "<!-- docs-check: printed by make demo, within 0.1 -->\n\n| a | b |\n|---|---|\n| x | 1.0 |\n",
            "no document runs",
        ),
        ("<!-- docs-check: printed by make -->\n", "is neither"),
        ("```sh\nmake demo\n", "a fence is not closed"),
    ],
)
def test_a_block_that_nothing_covers_is_found(text, told, tmp_path) -> None:
    found = faults(tmp_path, text)
    assert len(found) == 1 and told in found[0]


def test_marks_and_lines_of_commands(tmp_path) -> None:
    (tmp_path / "page.md").write_text(fenced("# needs a cluster", "a b", "c \\", "  d  # takes long", "", "e"))
    (block,) = read_document(tmp_path / "page.md").blocks
    found = [(c.line, c.one_line, c.mark) for c in commands(block)]
    assert found == [(3, "a b", "needs a cluster"), (4, "c d", "takes long"), (7, "e", "needs a cluster")]


PRINTED = """┏━━━━━━━━┳━━━━━━━━━━━┓
┃ arm    ┃ bits/byte ┃
┡━━━━━━━━╇━━━━━━━━━━━┩
│ target │    1.9895 │
│ merged │    1.9755 │
└────────┴───────────┘
Gain due to the source: +0.0010 [+0.0002, +0.0018] bits/byte, 0.3% of the gap,
against the best control (shrink). 1.4e-05
"""


def test_what_is_shown_is_compared_word_by_word() -> None:
    shown = PRINTED.replace("of the gap,\nagainst", "of\nthe gap, against").replace("1.9755", "1.9758")
    assert text_fault(shown, f"before\n{PRINTED}after", 0.001) is None
    assert text_fault("merged 1.9755", PRINTED, 0.0) is None
    assert "'1.9758'" in text_fault(shown, PRINTED, 0.0001)
    assert "(random)" in text_fault(shown.replace("(shrink)", "(random)"), PRINTED, 0.001)
    assert text_fault(shown.replace("1.4e-05", "2.0e-05"), PRINTED, 0.001) is None
    assert "3.4e-05" in text_fault(shown.replace("1.4e-05", "3.4e-05"), PRINTED, 0.001)
    assert text_fault("merged 1.9755\n\ntarget 1.9895", PRINTED, 0.001) is not None  # another order
    assert text_fault("", "", 0.001) is None  # a cell that prints nothing
    assert "'merged'" in text_fault("merged 1.9755", "", 0.001) and "nothing" in text_fault("merged", "", 0.001)


def test_tables_are_compared_row_by_row() -> None:
    table = "| arm | bits |\n|---|---|\n| `target` | 1.9893 |\n| merged | **1.9755** |"
    assert table_fault(table, PRINTED, 0.001) is None
    assert "'1.9893' was not printed" in table_fault(table, PRINTED, 0.0001)
    assert "no row 'adapted'" in table_fault(table.replace("merged", "adapted"), PRINTED, 0.001)


def test_a_page_is_run_as_printed(tmp_path, monkeypatch) -> None:
    """In a checkout of three files: order, failures, comparison, what is not run."""
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setattr("tools.docs_check.check.ROOT", root)
    note = NOTE.format("make -f own")
    (root / "own").write_text('all:\n\t@mkdir -p runs/x; echo "loss 1.004"\n')
    parts = [
        fenced("make \\", "    -f own"),
        note,
        fenced("loss 1.0", language="text"),
        note,
        fenced("loss 2.0", language="text"),
        fenced("print(sorted(p.name for p in __import__('pathlib').Path('runs').iterdir()))", language="python"),
        "<!-- docs-check: printed by this block, within 0 -->",
        fenced("['x']", language="text"),
        fenced("make nothing", "touch never  # needs the hub", "touch long  # takes long"),
    ]
    (root / "page.md").write_text("\n".join(parts))
    for long in (False, True):
        said: list[str] = []
        runner = Runner(tmp_path / f"copy-{long}", long=long, say=said.append)
        found = runner.document(runner.folder / "page.md")
        assert [fault.split(":")[1] for fault in found] == ["26", "13"]
        assert "ended with status 2" in found[0] and "'2.0'" in found[1] and "'1.004'" in found[1]
        assert not (runner.folder / "never").exists() and (runner.folder / "long").exists() == long
        assert any("touch never: not run (needs the hub)" in line for line in said)
    assert not (root / "runs").exists()
