"""The two checks: faults that show without running anything, and commands run exactly as printed."""

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.docs_check.blocks import PROGRAMS, SHELL, Block, Command, Document, commands, read_document
from tools.docs_check.compare import table_fault, text_fault
from tools.docs_check.dry import Dry, is_pattern, recipe_fault
from tools.docs_check.notebook import notebook_faults

ROOT = Path(__file__).resolve().parent.parent.parent
#: Blocks that are neither run nor compared: formulas. Directives of MyST (`{toctree}`) are the site's to check.
PLAIN = ("formula",)
#: A table of contents of the site.
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: Seconds after which a command counts as hanging.
LIMIT = 3600
#: It runs this check.
ITSELF = ("make test", "make test-slow", "make docs-check")


def contents(index: Path) -> list[str]:
    """Returns the pages that the tables of contents of a page name, in order."""
    tables = TOCTREE.findall(index.read_text(encoding="utf-8"))
    lines = [line.strip() for table in tables for line in table.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]


def documents(root: Path = ROOT) -> list[Path]:
    """Returns the documents of a checkout, in the order in which a newcomer reads them; notebooks are apart."""
    index = root / "docs/index.md"
    pages = [root / "docs" / f"{name}.md" for name in contents(index)]
    first = [root / "README.md", index, *(page for page in pages if page.is_file()), root / "CONTRIBUTING.md"]
    others = [*sorted(root.glob("docs/**/*.md")), *sorted(root.glob("experiments/**/README.md"))]
    return list(dict.fromkeys([*first, *others]))


def notebooks(root: Path = ROOT) -> list[Path]:
    """Returns the notebooks of a checkout."""
    return sorted(root.glob("docs/*.ipynb"))


def shell(document: Document) -> Iterator[tuple[Block, list[Command]]]:
    """The blocks of commands, with their commands."""
    for block in document.blocks:
        if block.language in SHELL:
            yield block, commands(block)


def static_faults(paths: list[Path], root: Path = ROOT) -> list[str]:
    """Finds faults of documents without running a command; each fault begins with its place."""
    found: list[str] = []
    dry = Dry(root)
    read: list[Document] = []
    for path in paths:
        if path.suffix == ".ipynb":
            found += notebook_faults(path)
            continue
        try:
            read.append(read_document(path))
        except ValueError as error:
            found.append(str(error))
    for document in read:
        for block in document.blocks:
            found += _block_faults(block, dry)
    run = {c.one_line for d in read for _, told in shell(d) for c in told if not c.mark.startswith("needs")}
    run |= {block.name for d in read for block in d.blocks if block.language == "python"}
    for document in read:
        for block in (*document.blocks, *document.tables):
            if block.note and block.note.command is not None and block.note.command not in run:
                found.append(f"{block.place}: printed by {block.note.command!r}, which no document runs")
        for line, span in document.spans:
            if not span.startswith(tuple(f"{name} " for name in PROGRAMS)) or len(span.split()) < 3:
                continue
            found += [f"{document.path.name}:{line}: {fault}" for fault in dry.faults(span, mark="needs")]
    return found


def _block_faults(block: Block, dry: Dry) -> list[str]:
    fault = None
    if block.language in SHELL:
        if block.language or block.text.lstrip().startswith(PROGRAMS):
            return [f"{c.place}: {fault}" for c in commands(block) for fault in dry.faults(c.text, mark=c.mark)]
        fault = "a block that is no command: say `text`, and what prints it"
    elif block.language == "python":
        fault = _python_fault(block.text)
    elif block.language == "yaml":
        fault = recipe_fault(block.text)
    elif block.language == "text":
        if block.note is None:
            fault = "nothing says what prints this: <!-- docs-check: printed by COMMAND, within X -->"
    elif block.language not in PLAIN and not block.language.startswith("{"):
        fault = f"the check knows no blocks of {block.language}"
    return [] if fault is None else [f"{block.place}: {fault}"]


def _python_fault(text: str) -> str | None:
    try:
        compile(text, "block", "exec")
    except SyntaxError as error:
        return f"line {error.lineno} is not Python: {error.msg}"
    return None


class Runner:
    """Runs what documents show, as printed, in a copy of the checkout, and compares what comes out.

    `long`: also what is marked `# takes ...`. `say` gets a line per command.
    """

    def __init__(self, folder: Path, *, long: bool, say: Callable[[str], None]) -> None:
        self.folder, self.long, self.say = folder, long, say
        self.printed: dict[str, str] = {}
        shutil.copytree(ROOT, folder, ignore=_ignored, dirs_exist_ok=True)
        # `make` finds the environment that runs this check, and no reason to make its own.
        venv = folder / ".venv"
        venv.mkdir()
        for name in ("bin", "lib", "pyvenv.cfg"):
            if (Path(sys.prefix) / name).exists():
                (venv / name).symlink_to(Path(sys.prefix) / name)
        for name in ("core.stamp", "test.stamp", "docs.stamp"):
            (venv / name).touch()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self.environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}

    def document(self, path: Path) -> list[str]:
        """Runs one document of the copy in order; returns faults: failures, and output that differs."""
        if path.suffix == ".ipynb":
            return self._run(path.name, [sys.executable, "-m", "tools.docs_check.notebook", str(path)], path.name)
        read = read_document(path)
        found: list[str] = []
        for block in read.blocks:
            if block.language in SHELL:
                for command in commands(block):
                    found += self._command(command)
            elif block.language == "python":
                found += self._run(block.place, [sys.executable, "-c", block.text], block.name)
        for block in (*read.blocks, *read.tables):
            found += self._shown(block)
        return found

    def _command(self, command: Command) -> list[str]:
        words = command.one_line
        why = command.mark
        if not why and words in ITSELF:
            why = "runs this check"
        elif not why and is_pattern(words.split()):
            why = "a pattern"
        if why and not (self.long and why.startswith("takes")):
            self.say(f"{command.place}: {words}: not run ({why})")
            return []
        return self._run(command.place, ["bash", "-c", command.text], words)

    def _run(self, place: str, told: list[str], name: str) -> list[str]:
        begin, before = time.perf_counter(), _processor()
        try:
            done = subprocess.run(
                told, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return [f"{place}: `{name}` did not end within {LIMIT} s"]
        self.printed[name] = done.stdout
        spent = f"{time.perf_counter() - begin:.1f} s ({_processor() - before:.1f} s of processor time)"
        self.say(f"{place}: {name}: {spent}, exit status {done.returncode}")
        if done.returncode == 0:
            return []
        last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
        return [f"{place}: `{name}` ended with status {done.returncode}: {last}"]

    def _shown(self, block: Block) -> list[str]:
        note = block.note
        if note is None or note.command is None or note.command not in self.printed:
            return []
        compare = table_fault if block.language == "table" else text_fault
        fault = compare(block.text, self.printed[note.command], note.tolerance)
        self.say(f"{block.place}: {'as' if fault is None else 'NOT as'} printed by {note.command}")
        return [] if fault is None else [f"{block.place}: not what {note.command!r} prints: {fault}"]


def _processor() -> float:
    """Processor time of all finished child processes: what a busy machine does not lengthen."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _ignored(folder: str, names: list[str]) -> set[str]:
    kept_out = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    return kept_out | ({"runs", "dist", "build"} if Path(folder) == ROOT else set())
