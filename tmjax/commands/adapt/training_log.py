"""`log.csv` of a training: a line per step; steps that are made again after an interruption replace theirs."""

import csv
import os
from pathlib import Path

from tmjax.train.loop import Facts


class StepLog:
    """The CSV file of one training; `valid` is the last validation loss."""

    def __init__(self, file: Path) -> None:
        self._file, self._stream, self.valid = file, None, None

    def add(self, fact: Facts) -> None:
        """Writes a step's line."""
        if self._stream is None:
            self._open(fact.step)
        if fact.valid is not None:
            self.valid = fact.valid
        csv.writer(self._stream).writerow(["" if value is None else value for value in fact])
        self._stream.flush()

    def _open(self, step: int) -> None:
        kept = [list(Facts._fields)]
        if self._file.is_file():
            with self._file.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.reader(stream))[1:]
            kept += [row for row in rows if len(row) == len(Facts._fields) and int(row[0]) < step]
        partial = self._file.with_suffix(".csv.new")
        self._stream = partial.open("w", newline="", encoding="utf-8")
        csv.writer(self._stream).writerows(kept)
        self._stream.flush()
        os.replace(partial, self._file)

    def close(self) -> None:
        """Closes the file."""
        if self._stream is not None:
            self._stream.close()
