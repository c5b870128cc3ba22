"""What a document shows against what was printed: word by word, numbers within a tolerance."""

import re

_BOX = re.compile(r"[\u2500-\u257f]")
_NUMBER = re.compile(r"[-+]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?%?")


def words(text: str) -> list[str]:
    """The words of a text; lines and bars of tables are none."""
    told = _BOX.sub(" ", text).replace("|", " ")
    return [word for word in told.split() if word.strip("-:")]


def number(word: str) -> float | None:
    """The number that a word is, brackets and stars around it apart."""
    bare = word.strip("[](),;:*`±")
    return float(bare.replace(",", "").removesuffix("%")) if _NUMBER.fullmatch(bare) else None


def agree(shown: str, printed: str, tolerance: float) -> bool:
    """Whether two words are the same; numbers to the tolerance, those with an exponent to a factor of 2."""
    a, b = number(shown), number(printed)
    if a is None or b is None:
        return shown.strip("`*") == printed.strip("`*")
    if "e" in shown.lower() or "e" in printed.lower():
        return a * b > 0 and 0.5 <= a / b <= 2
    return abs(a - b) <= tolerance + 1e-12


def text_fault(shown: str, printed: str, tolerance: float) -> str | None:
    """None if every paragraph shown is found, whole and in order, in what was printed; else what is different."""
    have = words(printed)
    start = 0
    for paragraph in re.split(r"\n\s*\n", shown):
        want = words(paragraph)
        if not want:
            continue
        best, place = 0, start
        for at in range(start, len(have)):
            length = next(
                (i for i, word in enumerate(want) if at + i >= len(have) or not agree(word, have[at + i], tolerance)),
                len(want),
            )
            if length > best:
                best, place = length, at
            if length == len(want):
                break
        if best < len(want):
            near = " ".join(want[max(0, best - 3) : best])
            other = have[place + best] if place + best < len(have) else "nothing"
            return f"after {near!r} the document has {want[best]!r}, the command printed {other!r}"
        start = place + len(want)
    return None


def table_fault(shown: str, printed: str, tolerance: float) -> str | None:
    """None if every row of a Markdown table has its numbers, in order, in the printed row of the same first cell."""
    rows = [_cells(line) for line in printed.splitlines() if re.search(r"[|│]", line)]
    for line in shown.splitlines()[2:]:
        label, *cells = _cells(line)
        numbers = [word for cell in cells for word in words(cell) if number(word) is not None]
        found = [row for row in rows if row and row[0] == label]
        if not found:
            return f"no row {label!r} was printed"
        faults = [_missing(numbers, [w for cell in row[1:] for w in words(cell)], tolerance) for row in found]
        if all(faults):
            return f"row {label!r}: {faults[0]!r} was not printed, but {' '.join(found[0][1:])!r}"
    return None


def _cells(line: str) -> list[str]:
    told = re.split(r"(?<!\\)[|│]", line.strip().strip("|│┃"))
    return [cell.strip().strip("`*") for cell in told]


def _missing(numbers: list[str], printed: list[str], tolerance: float) -> str | None:
    """The first number that does not follow the ones before it in a printed row."""
    rest = iter(printed)
    return next((wanted for wanted in numbers if not any(agree(wanted, word, tolerance) for word in rest)), None)
