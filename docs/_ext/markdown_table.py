"""Markdown that the generators share."""

from collections.abc import Iterable, Sequence


def cell(text: str) -> str:
    """Returns a text that may stand in a table."""
    return " ".join(text.replace("|", "\\|").split())


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table; columns that are empty in every row are left out."""
    filled = [[cell(value) for value in row] for row in rows]
    kept = [n for n in range(len(columns)) if any(row[n] for row in filled)]
    lines = [[columns[n] for n in kept], ["---"] * len(kept), *([row[n] for n in kept] for row in filled)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
