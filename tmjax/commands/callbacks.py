"""Signals of a running command: progress and warnings."""

from collections.abc import Callable, Mapping, Sequence

#: Called with (stage, steps done, steps in all). A total of 0 marks the beginning (0 done) or the end (1 done).
Progress = Callable[[str, int, int], None]
Warn = Callable[[str], None]


def quiet(_stage: str, _done: int, _total: int) -> None:
    """Shows no progress."""


def silent(_message: str) -> None:
    """Drops a warning."""


def tell_notes(notes: Mapping[str, Sequence[str]], warn: Warn) -> None:
    """Warns of everything that a user should know of the checkpoints, by name."""
    for name, lines in notes.items():
        for line in lines:
            warn(f"{name}: {line}")
