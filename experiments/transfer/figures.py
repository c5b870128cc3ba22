"""What the study found, as one picture: gains of all settings with intervals, and gains over calibration sizes.

    python experiments/transfer/figures.py experiments/transfer/README.md --out experiments/transfer/gain.png

draws every table of the study in a Markdown file, one below the other; `study.py` draws its own after every setting.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tmjax.errors import InputError
from tmjax.files.atomic import write_bytes
from tmjax.report.plots import new_figure, png_bytes
from tools.script import script

HEADER = "| setting | texts | seed | target | merged | best control | gain due to the source [95%] | of the gap |"
_GAIN = re.compile(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]")


class Gain(NamedTuple):
    """Gain due to the source and its 95% interval, in bits per byte, of a setting at a number of texts."""

    name: str
    texts: int
    value: float
    low: float
    high: float


def tables(markdown: str) -> list[tuple[str, list[Gain]]]:
    """Every table of the study in a text with the heading above it: its rows, of a setting and size the last alone.

    That one is of all seeds where there are several.
    """
    found, parts = [], markdown.split(HEADER)
    for before, part in pairwise(parts):
        heading = ["", *re.findall(r"^#+ (.*)$", before, re.MULTILINE)][-1]
        rows: dict[tuple[str, int], Gain] = {}
        for line in part.lstrip("\n").splitlines():
            if not line.startswith("|"):
                break
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            told = _GAIN.fullmatch(cells[6]) if len(cells) > 6 else None
            if told:
                rows[cells[0], int(cells[1])] = Gain(cells[0], int(cells[1]), *map(float, told.groups()))
        found.append((heading, list(rows.values())))
    return found


def _every(axis: object, rows: Sequence[Gain], texts: int) -> None:
    """Every setting that was run with this number of texts."""
    for place, row in enumerate(reversed(rows)):
        reach = [[row.value - row.low], [row.high - row.value]]
        axis.errorbar(row.value, place, xerr=reach, fmt="o", markersize=3, color="C0", capsize=2)
    axis.set_yticks(range(len(rows)), [row.name for row in reversed(rows)], fontsize="small")
    axis.axvline(0.0, color="0.6", linewidth=0.8)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel(f"gain due to the source, bits per byte ({texts} texts)")


def _of_sizes(rows: Sequence[Gain]) -> dict[str, list[Gain]]:
    """What was run with several numbers of texts, by name."""
    found: dict[str, list[Gain]] = {}
    for row in sorted(rows, key=lambda row: row.texts):
        found.setdefault(row.name, []).append(row)
    return {name: held for name, held in found.items() if len(held) > 1}


def _over_sizes(axis: object, several: dict[str, list[Gain]]) -> None:
    """Gains over the number of texts."""
    for number, (name, held) in enumerate(several.items()):
        reach = [[row.value - row.low for row in held], [row.high - row.value for row in held]]
        points = [row.texts for row in held], [row.value for row in held]
        axis.errorbar(*points, yerr=reach, fmt="o-", color=f"C{number}", capsize=2, label=name)
    axis.axhline(0.0, color="0.6", linewidth=0.8)
    axis.set_xscale("log")
    sizes = sorted({row.texts for held in several.values() for row in held})
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_xlabel("calibration texts")
    axis.set_ylabel("gain, bits per byte")
    axis.legend(fontsize="small")


def figure(markdown: str) -> bytes:
    """PNG, a row for every table: left every setting at the size that most were run with, right those of several."""
    found = [(heading, rows) for heading, rows in tables(markdown) if rows]
    if not found:
        raise InputError("there is no table of the study with a gain in the text")
    several = [_of_sizes(rows) for _, rows in found]
    columns = 2 if any(several) else 1
    at = []
    for _, rows in found:
        texts = [row.texts for row in rows]
        common = max(dict.fromkeys(texts), key=texts.count)
        at.append((common, [row for row in rows if row.texts == common]))
    height = max(3.0, 0.2 * max(len(rows) for _, rows in at) + 1.0)
    picture, axes = new_figure(columns, len(found), 5.5, height)
    for line, (heading, _), (common, held), sizes in zip(axes, found, at, several, strict=True):
        line[0].set_title(heading)
        _every(line[0], held, common)
        if sizes:
            _over_sizes(line[1], sizes)
        elif columns == 2:
            line[1].set_axis_off()
    return png_bytes(picture)


def main() -> None:
    """Draws the tables of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, help="a Markdown file, such as OUT/table.md of the study")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write; one that is there is replaced")
    told = parser.parse_args()
    try:
        text = told.tables.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {told.tables}: {error.strerror}") from None
    picture = figure(text)
    told.out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(told.out, picture)


if __name__ == "__main__":
    with script("figures"):
        main()
