"""Ctrl-C that cannot be lost: an interrupt that Python swallowed is raised again.

Python raises KeyboardInterrupt wherever the main thread is. In a callback of the garbage collector (JAX has one), a
`__del__` or a foreign library's `except:` it is printed as ignored, or not even that, and the run goes on. So the
interrupt is noted; it is raised again as soon as Python reports one as unraisable, and at the next step of progress.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

#: Seconds after which a swallowed interrupt is raised again: the callback that swallowed it has ended by then.
_AGAIN_S = 0.05
_R = TypeVar("_R")
_noted = threading.Event()
_timers: list[threading.Timer] = []


def noted() -> bool:
    """Whether the command that is running was interrupted."""
    return _noted.is_set()


def check() -> None:
    """Raises KeyboardInterrupt if there was one that did not end the command."""
    if _noted.is_set() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def checked(step: Callable[..., _R]) -> Callable[..., _R]:
    """The function, which first checks for an interrupt."""

    @functools.wraps(step)
    def call(*args: Any, **options: Any) -> _R:
        check()
        return step(*args, **options)

    return call


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    _noted.set()
    raise KeyboardInterrupt


def _again(report: Any, before: Callable[[Any], object]) -> None:
    if not isinstance(report.exc_value, KeyboardInterrupt):
        before(report)
        return
    # A real signal: it also ends waiting in a system call.
    timer = threading.Timer(_AGAIN_S, os.kill, [os.getpid(), signal.SIGINT])
    timer.daemon = True
    _timers.append(timer)
    timer.start()


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """For the time of a command, notes interrupts and raises swallowed ones again; main thread only.

    Where interrupts are ignored, as of a background process, or someone else handles them, nothing is changed.
    """
    _noted.clear()
    own = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _early)
    if threading.current_thread() is not threading.main_thread() or not own:
        yield
        return
    before, hook = signal.signal(signal.SIGINT, _interrupt), sys.unraisablehook
    sys.unraisablehook = lambda report: _again(report, hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        while _timers:  # code after the command is not to be interrupted
            _timers.pop().cancel()
        signal.signal(signal.SIGINT, before)


def _early(_number: int, _frame: FrameType | None) -> None:
    """While modules are loaded nothing has been written yet that would have to be cleared away."""
    os.write(2, b"tmjax: error: interrupted\n")
    os._exit(130)


def from_the_start() -> None:
    """Makes an interrupt end the process in one line from now on, until a command begins."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _early)


def ignore() -> None:
    """Ignores interrupts: the command has ended, and only the interpreter has yet to."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
