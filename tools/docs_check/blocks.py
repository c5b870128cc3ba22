"""What a Markdown document shows: fenced blocks, tables, commands in running text, and how each is to be checked.

A comment before a block or table says where it comes from (`printed by`, `not compared`); a comment in a command block
says why a command is not run as a matter of course (`# needs the hub`, `# takes 20 minutes`).
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

#: `<!-- docs-check: printed by make demo, within 0.001 -->`; `this block` is the Python block above.
NOTE = re.compile(r"<!-- docs-check: (.*?) -->")
PRINTED = re.compile(r"printed by (.+), within ([\d.]+)")
#: Why a command is not run: it cannot be here, or only if asked for.
MARK = re.compile(r"(?:^|\s)#\s*((?:needs|takes)\b.*)$")
PROGRAMS = ("tmjax", "python", "make", "pip", "pytest", "mpirun", "srun", "sbatch", "gcloud")
SHELL = ("", "sh", "bash")
THIS = "this block"
CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Note:
    """What a comment says of the block below it: the command that prints it and a tolerance, or why none is run."""

    command: str | None
    tolerance: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Block:
    """A fenced block, from the line after its fence, or a table."""

    document: Path
    line: int
    language: str
    text: str
    note: Note | None = None

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return f"{self.document.name}:{self.line}"

    @property
    def name(self) -> str:
        """What a note calls a block that is run whole."""
        return f"the Python block at {self.place}"


@dataclass(frozen=True)
class Command:
    """A command with its continuation lines, exactly as printed; `mark` says why it is not run."""

    document: Path
    line: int
    text: str
    mark: str = ""

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return f"{self.document.name}:{self.line}"

    @property
    def one_line(self) -> str:
        """The command without its continuations and comments."""
        return " ".join(re.sub(r"\s#\s.*$", "", self.text.replace("\\\n", " "), flags=re.MULTILINE).split())


@dataclass(frozen=True)
class Document:
    """Blocks and tables in order, and the code spans of running text and tables."""

    path: Path
    blocks: list[Block]
    tables: list[Block]
    spans: list[tuple[int, str]]


def read_note(text: str) -> Note:
    """The note that a comment holds; raises ValueError for words that mean nothing."""
    if text.startswith("not compared"):
        return Note(None, reason=text)
    found = PRINTED.fullmatch(text)
    if found is None:
        raise ValueError(f"docs-check: {text!r} is neither `printed by COMMAND, within X` nor `not compared, WHY`")
    return Note(found[1], float(found[2]))


def read_document(path: Path) -> Document:
    """A document's parts; raises ValueError for a fence that is not closed or a note that cannot be read."""
    blocks: list[Block] = []
    tables: list[Block] = []
    spans: list[tuple[int, str]] = []
    note: Note | None = None
    paragraph: list[str] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    at = 0

    def close() -> None:
        spans.extend((at, found) for found in CODE.findall(" ".join(paragraph)))
        paragraph.clear()

    while at < len(lines):
        line = lines[at]
        if line.startswith("```"):
            close()
            end = next((i for i in range(at + 1, len(lines)) if lines[i].startswith("```")), None)
            if end is None:
                raise ValueError(f"{path.name}:{at + 1}: a fence is not closed")
            text = "\n".join(lines[at + 1 : end])
            if note is not None and note.command == THIS:
                above = next((block for block in reversed(blocks) if block.language == "python"), None)
                if above is None:
                    raise ValueError(f"{path.name}:{at + 1}: there is no Python block above")
                note = replace(note, command=above.name)
            blocks.append(Block(path, at + 2, line[3:].strip(), text, note))
            at, note = end + 1, None
            continue
        if line.startswith("|"):
            close()
            end = next((i for i in range(at, len(lines)) if not lines[i].startswith("|")), len(lines))
            tables.append(Block(path, at + 1, "table", "\n".join(lines[at:end]), note))
            # A bar inside a cell is escaped.
            spans.extend((i + 1, s.replace("\\|", "|")) for i in range(at, end) for s in CODE.findall(lines[i]))
            at, note = end, None
            continue
        told = NOTE.search(line)
        if told:
            close()
            note = read_note(told[1])
        elif line.strip():
            paragraph.append(line.strip())
            note = None
        else:
            close()
        at += 1
    close()
    return Document(path, blocks, tables, spans)


def commands(block: Block) -> list[Command]:
    """The commands of a shell block. A line that is only a mark holds for the whole block."""
    whole = ""
    found: list[tuple[int, str]] = []
    pending: list[str] = []
    for number, line in enumerate(block.text.splitlines(), block.line):
        if not pending and (not line.strip() or line.lstrip().startswith("#")):
            mark = MARK.search(line)
            whole = mark[1] if mark else whole
            continue
        pending.append(line)
        if not line.endswith("\\"):
            found.append((number - len(pending) + 1, "\n".join(pending)))
            pending = []
    if pending:
        found.append((block.line, "\n".join(pending)))
    marks = [MARK.search(text) for _, text in found]
    return [
        Command(block.document, line, text, mark[1] if mark else whole)
        for (line, text), mark in zip(found, marks, strict=True)
    ]
