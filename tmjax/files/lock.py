"""One writer per output: an advisory lock that ends with its process, and a record of who holds it.

The lock is `flock` on a hidden file beside the output (inside it where the folder above cannot be written to), so the
kernel releases it when the process dies, however it dies. NFS and most cluster file systems pass it on to other hosts.
The file is deleted on release; whoever opened it before locks an unlinked file, sees that and starts again.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmjax.errors import InputError
from tmjax.files.paths import refuse_name

SUFFIX = ".tmjax-lock"
#: Errors of file systems without locks.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NAME_BYTES = 200
_COMMAND_CHARACTERS = 160


@dataclass
class _Lock:
    """A lock of this process, counted: one thread may take it again."""

    descriptor: int
    file: Path
    made: list[Path]
    thread: int
    process: int = field(default_factory=os.getpid)
    count: int = 1


_guard = threading.RLock()
_locks: dict[Path, _Lock] = {}
_handles: "set[OutputLock]" = set()
_command: list[str] = []


class OutputLock:
    """Holds the lock of an output from its making to `release`; the thread that holds it may make another.

    An output is a directory by default. Raises InputError that names the holder, or the reason why the place cannot be
    written to.
    """

    def __init__(self, path: Path, *, directory: bool = True) -> None:
        self._path: Path | None = None
        real = refuse_name(path) if directory else Path(os.path.realpath(path))
        with _guard:
            mine = _locks.get(real)
            if mine is None:
                _locks[real] = _acquire(real, path)
            elif mine.thread != threading.get_ident():
                raise InputError(_refusal(path, _record()))
            else:
                mine.count += 1
            self._path = real
            _handles.add(self)

    def release(self) -> None:
        """Gives the lock up; a second call does nothing."""
        with _guard:
            path, self._path = self._path, None
            _handles.discard(self)
            lock = _locks.get(path) if path is not None else None
            if lock is None:
                return
            lock.count -= 1
            if lock.count == 0:
                del _locks[path]
                _give_up(lock)

    def __enter__(self) -> "OutputLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextlib.contextmanager
def command(arguments: Sequence[str]) -> Iterator[None]:
    """Records a command with every lock while it runs, and releases the locks that it leaves at its end."""
    before, previous = set(_handles), list(_command)
    _command[:] = arguments
    try:
        yield
    finally:
        release_all(keep=before)
        _command[:] = previous


def current_command() -> tuple[str, ...]:
    """Returns the words of the command that runs; none outside of the command line."""
    return tuple(_command)


def release_all(keep: "set[OutputLock] | frozenset[OutputLock]" = frozenset()) -> None:
    """Releases every lock of this process but `keep`."""
    for handle in set(_handles) - keep:
        handle.release()


def lock_files(path: Path) -> tuple[Path, Path]:
    """The paths at which the lock of an output can lie: beside it, or inside it."""
    name = path.name
    if len(os.fsencode(name)) > _NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}{SUFFIX}"), path / SUFFIX


def _acquire(real: Path, shown: Path) -> _Lock:
    beside, inside = lock_files(real)
    made: list[Path] = []
    try:
        try:
            return _lock(beside, shown, made)
        except OSError as error:
            if error.errno not in _DENIED or not (real.is_dir() and os.access(real, os.W_OK)):
                raise
            return _lock(inside, shown, made)
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"cannot write to {shown}: {error.strerror or error}") from None
    except InputError:
        _remove_empty(made)
        raise


def _lock(file: Path, shown: Path, made: list[Path]) -> _Lock:
    while True:
        _make_parents(file.parent, made)
        try:
            descriptor = _open(file)
        except FileNotFoundError:  # another process has just deleted the folder that it had made
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                record = _read(descriptor)
                os.close(descriptor)
                raise InputError(_refusal(shown, record)) from None
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            warnings.warn(
                f"the file system of {shown} has no locks: see to it that no other command writes there", stacklevel=2
            )
        if _is_still(file, descriptor):
            break
        os.close(descriptor)
    with contextlib.suppress(OSError):  # a full disk, or a file of another user's: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_record()).encode(), 0)
    return _Lock(descriptor, file, made, threading.get_ident())


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        if not file.exists():
            raise
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)


def _is_still(file: Path, descriptor: int) -> bool:
    """Whether the locked file is still the one at this path."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _give_up(lock: _Lock) -> None:
    if lock.process == os.getpid():  # a forked child shares the lock and must not end it
        if _is_still(lock.file, lock.descriptor):
            with contextlib.suppress(OSError):
                lock.file.unlink()
        _remove_empty(lock.made)
    os.close(lock.descriptor)


def _make_parents(folder: Path, made: list[Path]) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        try:
            new.mkdir()
        except FileExistsError:
            continue
        made.append(new)


def _remove_empty(made: list[Path]) -> None:
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _record() -> dict[str, Any]:
    line = shlex.join(_command or [Path(sys.argv[0] or "python").name, *sys.argv[1:]])
    if len(line) > _COMMAND_CHARACTERS:
        line = line[: _COMMAND_CHARACTERS - 3] + "..."
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": line,
    }


def _read(descriptor: int) -> dict[str, Any]:
    """The holder's record; waits for a holder that is about to write it."""
    for _ in range(20):
        with contextlib.suppress(ValueError, OSError):
            record = json.loads(os.pread(descriptor, 2**16, 0))
            if isinstance(record, dict):
                return record
        time.sleep(0.02)
    return {}


def _refusal(path: Path, record: dict[str, Any]) -> str:
    who = "another command"
    if {"host", "process", "since", "command"} <= record.keys():
        who = f"`{record['command']}` (host {record['host']}, process {record['process']}, since {record['since']})"
    return f"{path} is being written by {who}; wait for it, stop it, or choose another output"
