"""The outcome of a sweep: a row per setting, the best of them, tables on disk."""

import csv
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tmjax.commands.sweep.grid import Setting, Value
from tmjax.files.atomic import partial_name


@dataclass(frozen=True)
class Result:
    """Outcome of one setting: bits per byte on the validation texts and cost; None with a `reason` if it failed.

    `seconds` is the setting's share of its batch, without compilation and without the work that its group shares.
    `seed` is that of the setting, or the recipe's.
    """

    number: int
    setting: Setting
    bits_per_byte: float | None
    seconds: float
    seed: int
    group: int
    reason: str = ""

    @property
    def status(self) -> str:
        """`done` or `failed`."""
        return "failed" if self.bits_per_byte is None else "done"

    def cells(self) -> dict[str, Value]:
        """Returns the row of a table."""
        own = {"bits_per_byte": self.bits_per_byte, "seconds": self.seconds, "seed": self.seed, "group": self.group}
        swept = {key: value for key, value in self.setting.items() if key != "seed"}
        return {"setting": self.number, **swept, **own, "status": self.status, "reason": self.reason}


def best_of(results: Sequence[Result]) -> Result | None:
    """Returns the result with the fewest bits per byte, the first of equals; None if all failed."""
    done = [result for result in results if result.bits_per_byte is not None]
    return min(done, key=lambda result: (result.bits_per_byte, result.number), default=None)


def write_csv(file: Path, results: Sequence[Result]) -> None:
    """Writes one line per result under a header; missing values are empty cells."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(results[0].cells()))
        writer.writeheader()
        writer.writerows(result.cells() for result in results)


def has_parquet() -> bool:
    """Whether pyarrow, which writes Parquet, is installed."""
    return importlib.util.find_spec("pyarrow") is not None


def write_parquet(file: Path, results: Sequence[Result]) -> None:
    """Writes the same table as Parquet; a column with values of several types is written as text."""
    import pyarrow
    import pyarrow.parquet

    rows = [result.cells() for result in results]
    columns = {key: _of_one_type([row[key] for row in rows]) for key in rows[0]}
    partial = partial_name(file)
    pyarrow.parquet.write_table(pyarrow.table(columns), partial)
    os.replace(partial, file)


def _of_one_type(column: list[Value]) -> list[Value]:
    types = {type(value) for value in column if value is not None}
    if types <= {int, float}:
        return column if len(types) < 2 else [None if value is None else float(value) for value in column]
    return column if len(types) < 2 else [None if value is None else str(value) for value in column]


def read_csv(file: Path) -> list[dict[str, Value]]:
    """Reads rows that `write_csv` wrote. Cells that read as numbers are numbers, empty cells are None."""
    with file.open(newline="", encoding="utf-8") as stream:
        return [{key: _parsed(cell) for key, cell in row.items()} for row in csv.DictReader(stream)]


def _parsed(cell: str) -> Value:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell or None
