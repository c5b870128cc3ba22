"""Progress of a command on standard error: bars on a terminal, lines in a log."""

import sys
import threading
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

#: Seconds between two lines about a stage.
EVERY = 30.0


class Bars:
    """A bar for each stage. Nothing is shown before the first one, so a refused run shows the reason alone."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.display = Progress(*columns, console=console)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self.display.stop()

    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Shows that `done` of `total` is done. A total of 0 marks the beginning (0) or the end (1) of a stage."""
        self.display.start()
        self.update(stage, done, total, note)

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Does the same as `step` where something else draws the bars."""
        if stage not in self._tasks:
            self._tasks[stage] = self.display.add_task(stage, total=total or None)
        known = next(task for task in self.display.tasks if task.id == self._tasks[stage])
        if not total:  # full after the end, moving while the total is unknown
            done, total = (known.total or 1, known.total or 1) if done else (known.completed, known.total)
        described = f"{stage}  {note}" if note else stage
        self.display.update(known.id, completed=done, total=total, description=described)

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        self.display.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Lines:
    """Lines at the beginning and the end of a stage, and every `every` seconds between with the time left."""

    def __init__(self, stream: TextIO = sys.stderr, *, every: float = EVERY) -> None:
        self._stream, self._every = stream, every
        self._lock, self._over = threading.Lock(), threading.Event()
        #: Open stages, the innermost last: time of the beginning, time when the count began, the count.
        self._open: dict[str, tuple[float, float, int, int, str]] = {}
        self._ticking = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Lines":
        self._ticking.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        self._ticking.join()
        if kind is None:  # stages of commands without a run directory have no end
            for stage in list(self._open)[::-1]:
                self.step(stage, 1, 0)

    def say(self, line: str) -> None:
        """Prints a line."""
        with self._lock:
            print(line, file=self._stream, flush=True)

    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Takes note that `done` of `total` is done. A total of 0 marks the beginning (0) or the end (1) of a stage."""
        now, line = time.monotonic(), None
        with self._lock:
            begun, counted, before, of, _ = self._open.get(stage, (now, now, 0, 0, ""))
            if total == 0 and done:
                self._open.pop(stage, None)
                line = f"{stage}: done in {_clock(now - begun)}"
            else:
                line = None if stage in self._open else f"{stage} ..."
                if total != of or done < before:  # another count begins
                    counted = now
                self._open[stage] = (begun, counted, done, total, note)
        if line is not None:
            self.say(f"tmjax: {line}")

    def _tick(self) -> None:
        while not self._over.wait(self._every):
            with self._lock:
                last = next(reversed(self._open.items()), None)
            if last is not None:
                self.say(f"tmjax: {_so_far(*last)}")


def _so_far(stage: str, state: tuple[float, float, int, int, str]) -> str:
    begun, counted, done, total, note = state
    now = time.monotonic()
    parts = [f"{stage}: {done}/{total}" if total else stage, f"{_clock(now - begun)} so far"]
    if 0 < done < total:
        parts.append(f"about {_clock((now - counted) / done * (total - done))} left")
    return ", ".join([*parts, note] if note else parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
