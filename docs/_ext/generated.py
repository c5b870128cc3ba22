"""Fills pages with what is kept elsewhere: settings, commands, public names, and Markdown files of the repository.

A page holds `<!-- generated: NAME -->` where the text belongs. NAME is a key of `GENERATORS`, or a Markdown file of the
repository (`experiments/transfer/README.md`), whose links are rewritten. Links of pages to files of the repository that
have a page lead to that page; links to other files become plain code.
"""

import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

import cli_reference
import python_reference
import recipe_reference
from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent

GENERATORS: Mapping[str, Callable[[], str]] = {
    "recipe of a merge": recipe_reference.merge_recipe,
    "recipe of an adaptation": recipe_reference.adapt_recipe,
    "recipe of several steps": recipe_reference.steps_recipe,
    "operators": recipe_reference.operators,
    "presets": recipe_reference.presets,
    "solvers": recipe_reference.solvers,
    "command line": cli_reference.commands,
    "public functions": python_reference.functions,
}
MARK = re.compile(r"<!-- generated: (.+?) -->")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def page_of(file: PurePosixPath) -> PurePosixPath | None:
    """Returns the page, as a path below `docs/`, that shows a Markdown file of the repository."""
    fixed = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
    if str(file) in fixed:
        return PurePosixPath(fixed[str(file)])
    if file.parts[0] == "docs" and file.suffix in (".md", ".ipynb"):
        return PurePosixPath(*file.parts[1:])
    if file.parts[0] == "experiments" and file.name == "README.md":
        return PurePosixPath("experiments", f"{file.parent.name if len(file.parts) > 2 else 'data'}.md")
    return None


def relinked(text: str, file: PurePosixPath, page: PurePosixPath) -> str:
    """Rewrites the relative links of a Markdown text.

    Args:
        text: Markdown.
        file: Where the text is kept, from the repository's root; its links are relative to that.
        page: The page that shows it, below `docs/`.
    """

    def link(found: re.Match[str]) -> str:
        picture, label, target, anchor = found[1], found[2], found[3], found[4] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        place = PurePosixPath(os.path.normpath(file.parent / target))
        shown = page_of(place)
        if shown is not None:
            return f"{picture}[{label}]({os.path.relpath(shown, page.parent)}{anchor})"
        if picture:
            return f"![{label}]({os.path.relpath(ROOT / place, (DOCS / page).parent)})"
        code = label if label.startswith("`") else f"{label} (`{place}`)"
        return code

    return LINK.sub(link, text)


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Handles `source-read`: generated parts are put in, links of the page are rewritten."""
    if str(app.env.doc2path(docname)).endswith(".ipynb"):
        return
    page = PurePosixPath(f"{docname}.md")
    parts = []
    for number, part in enumerate(MARK.split(source[0])):
        if number % 2 == 0:
            parts.append(relinked(part, PurePosixPath("docs") / page, page))
        elif part in GENERATORS:
            parts.append(GENERATORS[part]())
            app.env.note_dependency(inspect.getsourcefile(GENERATORS[part]) or __file__, docname=docname)
        else:
            file = ROOT / part
            app.env.note_dependency(str(file), docname=docname)
            parts.append(relinked(file.read_text(encoding="utf-8"), PurePosixPath(part), page))
    source[0] = "".join(parts)


def plain_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Handles `autodoc-process-docstring`: `|`, `*` and `x_` are characters in our docstrings, not markup."""
    for number, line in enumerate(lines):
        pieces = re.split(r"(`+[^`]*`+)", line)
        pieces[::2] = [re.sub(r"(\||\*|(?<=\w)_(?!\w))", r"\\\1", piece) for piece in pieces[::2]]
        lines[number] = "".join(pieces)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the handlers."""
    app.connect("source-read", fill)
    # Before napoleon, whose priority is the default 500.
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)
    return {"parallel_read_safe": True}
